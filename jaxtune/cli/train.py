"""Train, or continue a run that was stopped.

jaxtune train CONFIG.yaml [key=value ...] [--fresh]
jaxtune train --model MODEL --data FILE [key=value ...]
"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.workflows.train import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_config, add_json, add_processes, add_verify_cache

    add_config(parser)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="remove an earlier run in the same directory instead of continuing it",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_processes(parser)
    add_verify_cache(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from jaxtune.cli.options import apply_verify_cache, config_of, write_json
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.train import run as train

    apply_verify_cache(options)
    result = train(config_of(options), Reporter(options.quiet), fresh=options.fresh)
    print(run_text(result))
    write_json(options.json, run_json(result))


def run_json(result: "Run") -> dict[str, Any]:
    """Return what `--json` writes of a run."""
    paths = {
        name: str(path) if path else None
        for name, path in (("adapter", result.adapter), ("model", result.model))
    }
    return {"dir": str(result.dir), **paths, "before": result.before, "after": result.after}


def run_text(result: "Run") -> str:
    """Return what a run prints at its end."""
    from jaxtune.cli.options import metrics_table

    lines = []
    if result.before and result.after:
        lines += [metrics_table({"before": result.before, "after": result.after}), ""]
    comparison = result.verification
    lines.append(f"Adapter: {result.adapter}" if result.adapter else f"Model:   {result.model}")
    lines.append(
        f"  verified over {comparison.tokens} tokens: reloaded logits differ by "
        f"{comparison.reload_difference:.1e} (largest {comparison.largest_logit:.1f})"
    )
    checker = "PEFT" if result.adapter else "transformers"
    if comparison.torch_note is None:
        lines.append(f"  {checker}'s differ by {comparison.torch_difference:.1e}")
    else:
        lines.append(f"  not compared with {checker}: {comparison.torch_note}")
    lines.append(f"Report:  {result.dir}/report.html")
    return "\n".join(lines)
