"""Arguments and output that several commands share."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.config.schema import Config
    from jaxtune.core.distributed import Cluster
    from jaxtune.inference.sampling import Sampling
    from jaxtune.workflows.export_result import ExportResult


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE`."""
    parser.add_argument(
        "--json", metavar="FILE", help="also write the results as JSON ('-': to stdout)"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `[CONFIG.yaml] [key=value ...] [--model MODEL] [--data FILE]`."""
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="a configuration file, and keys that override it",
    )
    parser.add_argument("--model", help="the same as model.source=...")
    parser.add_argument("--data", help="the same as data.train=...")


def add_verify_cache(parser: argparse.ArgumentParser) -> None:
    """Add `--verify-cache`."""
    parser.add_argument(
        "--verify-cache",
        action="store_true",
        help="compare all of the cached tokens with their digests, not a sample",
    )


def apply_verify_cache(options: argparse.Namespace) -> None:
    """Let what is read from the cache be verified as a whole, if asked to."""
    from jaxtune.data.store import VERIFY_ALL

    if options.verify_cache:
        os.environ[VERIFY_ALL] = "1"


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add `--coordinator HOST:PORT --processes N --process I`."""
    text = "of several processes: {}; detected on Cloud TPU, SLURM, Open MPI and GKE"
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help=text.format("where the first one is")
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help=text.format("how many there are")
    )
    parser.add_argument(
        "--process", type=int, metavar="I", help=text.format("the number of this one, from 0")
    )


def cluster_of(options: argparse.Namespace) -> "Cluster | None":
    """Return the launcher that the arguments of `add_processes` name; None without them.

    Raises:
        UserError: only some of them are there.

    """
    from jaxtune.core.distributed import explicit_cluster
    from jaxtune.core.errors import UserError

    values = [getattr(options, name, None) for name in ("coordinator", "processes", "process")]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise UserError("--coordinator, --processes and --process go together: give all three.")
    address, total, number = values
    return explicit_cluster(str(address), int(total or 0), int(number or 0))


def config_of(options: argparse.Namespace) -> "Config":
    """Return the configuration that the arguments of `add_config` describe."""
    from jaxtune.cli.config import load_arguments

    shortcuts = [
        f"{key}={value}"
        for key, value in (("model.source", options.model), ("data.train", options.data))
        if value
    ]
    return load_arguments([*options.arguments, *shortcuts])


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `MODEL [--adapter DIR]`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, directory of Hugging Face's or Meta's files, .gguf file or run directory",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="a PEFT adapter (a run directory brings its own)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add `--temperature T --top-k K --top-p P --min-p P --repetition-penalty X --seed N`."""
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens; 0 is all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the most likely tokens that together reach P",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens at least P times as likely as the most likely one",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that were there before are less likely",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws")


def sampling_of(options: argparse.Namespace) -> "Sampling":
    """Return the sampling that the arguments of `add_sampling` describe."""
    from jaxtune.inference.sampling import Sampling

    return Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.repetition_penalty,
        options.seed,
    )


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype NAME --push REPO --json FILE`."""
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="of the weights: float32, bfloat16, float16; for gguf also q8_0, q6_k, q5_k_m, q4_k_m "
        "(default: unchanged)",
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload to this repository of the hub afterwards"
    )
    add_json(parser)


def print_export(result: "ExportResult", to: str, json_path: str | None) -> None:
    """Print what was verified of an export, and write it for `--json`."""
    from jaxtune.weights.formats.registry import get_format

    comparison, checker = result.comparison, get_format(to).checked_by
    checked = (
        f"{checker} {comparison.torch_difference:.1e}"
        if comparison.torch_note is None
        else f"{checker} not run ({comparison.torch_note})"
    )
    if json_path != "-":
        print(
            f"{result.path}: verified over {comparison.tokens} tokens; read again it differs by "
            f"{comparison.reload_difference:.1e}, {checked}"
        )
        for consumer in result.consumers:
            print(f"  {consumer}")
        if comparison.divergence is not None and comparison.same_choice is not None:
            print(
                f"Rounded: beside the original, KL {comparison.divergence:.2e} nats a token and "
                f"the same likeliest token after {comparison.same_choice:.1%}"
            )
    readers = [consumer.as_dict() for consumer in result.consumers]
    listed_readers = {"consumers": readers} if readers else {}
    write_json(json_path, {"out": str(result.path), **comparison.as_dict(), **listed_readers})


def write_json(path: str | None, value: Any) -> None:
    """Write a value to the file of `--json`, or print it for `-`; without `--json`, do nothing."""
    from jaxtune.core.distributed import is_main

    if not is_main():
        return
    if path == "-":
        json.dump(value, sys.stdout, indent=2)
        print()
    elif path:
        from pathlib import Path

        from jaxtune.core import files

        files.write_json(Path(path), value)


def metrics_table(
    columns: dict[str, dict[str, Any]], comparison: dict[str, dict[str, Any]] | None = None
) -> str:
    """Return metrics side by side: a column for each name, and the interval of the last column or
    its difference from the first.

    Args:
        columns: what `jaxtune eval --json` holds, or rows of metrics.jsonl.
        comparison: the result of `statistics.compare`, by metric.

    """
    from jaxtune.tracking.metrics_log import metric_names

    last = list(columns.values())[-1]
    lines = [
        " " * 16
        + "".join(f"{name:>12}" for name in columns)
        + ("  difference" if comparison else "")
    ]
    for name in ("rows", *metric_names(last)):
        cells = "".join(_cell(values.get(name)) for values in columns.values())
        lines.append(f"{name:<16}{cells}{_interval(name, last, comparison)}")
    return "\n".join(lines)


def _interval(name: str, last: dict[str, Any], comparison: dict[str, dict[str, Any]] | None) -> str:
    if comparison is None:
        interval = last.get("intervals", {}).get(name)
        return f"   95%: {_ends(interval)}" if interval else ""
    if name not in comparison:
        return ""
    difference, interval, p_value = (
        comparison[name][key] for key in ("difference", "interval", "p_value")
    )
    return f"{difference:>+12.4f}   95%: {_ends(interval)}, p {_p(p_value)}"


def _ends(interval: list[float]) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _cell(value: Any) -> str:
    if value is None:
        return f"{'-':>12}"
    return f"{value:>12.4f}" if isinstance(value, float) else f"{value!s:>12}"
