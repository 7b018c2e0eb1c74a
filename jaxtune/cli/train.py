"""Train, or go on with a run that was stopped.

jaxtune train CONFIG.yaml [key=value ...] [--fresh]
jaxtune train --model MODEL --data FILE [key=value ...]
"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.workflows.train import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_config, add_json, add_processes

    add_config(parser)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="remove an earlier run in the same directory instead of going on with it",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_processes(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Train."""
    from jaxtune.cli.options import config_of, write_json
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.train import run as train

    result = train(config_of(options), Reporter(options.quiet), fresh=options.fresh)
    print(summary(result))
    write_json(options.json, figures(result))


def figures(result: "Run") -> dict[str, Any]:
    """What `--json` holds of a run."""
    places = {
        name: str(path) if path else None
        for name, path in (("adapter", result.adapter), ("model", result.model))
    }
    return {"dir": str(result.dir), **places, "before": result.before, "after": result.after}


def summary(result: "Run") -> str:
    """What came of a run, for a person."""
    from jaxtune.cli.options import metrics_table

    lines = []
    if result.before and result.after:
        lines += [metrics_table({"before": result.before, "after": result.after}), ""]
    proof = result.verification
    lines.append(f"Adapter: {result.adapter}" if result.adapter else f"Model:   {result.model}")
    lines.append(
        f"  verified over {proof.tokens} tokens: reloaded logits differ by "
        f"{proof.reload_difference:.1e} (largest {proof.largest_logit:.1f})"
    )
    whose = "PEFT" if result.adapter else "transformers"
    theirs = (
        f"  {whose}'s differ by {proof.torch_difference:.1e}"
        if proof.torch_note is None
        else f"  not compared with {whose}: {proof.torch_note}"
    )
    lines += [theirs, f"Report:  {result.dir}/report.html"]
    return "\n".join(lines)
