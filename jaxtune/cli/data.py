"""What will be trained on: counts, lengths, packing, warnings, and the first rows with their
supervised tokens.

jaxtune data CONFIG.yaml [key=value ...]
jaxtune data --model MODEL --data FILE [key=value ...]
"""

import argparse
from typing import TYPE_CHECKING, Any

from jaxtune.core.text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from jaxtune.core.tokenizer import Tokenizer
    from jaxtune.data.examples import Examples
    from jaxtune.training.inputs import Inputs

_WIDTH = 40
_MAX_LOCATIONS = 10
_MAX_CHARACTERS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_config, add_json, add_verify_cache

    add_config(parser)
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)"
    )
    add_verify_cache(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from rich.console import Console

    from jaxtune.cli.options import apply_verify_cache, config_of, write_json
    from jaxtune.core import runtime
    from jaxtune.core.errors import UserError
    from jaxtune.tracking.progress import Reporter
    from jaxtune.training.inputs import read_inputs

    runtime.start()
    apply_verify_cache(options)
    config = config_of(options)
    lenient = config.model_copy(
        update={"data": config.data.model_copy(update={"on_error": "skip"})}
    )
    inputs = read_inputs(lenient, Reporter())
    summary = _summarize(inputs)
    if options.json != "-":
        console = Console(highlight=False, soft_wrap=True)
        for name, part in summary["parts"].items():
            _show_part(console, name, part)
        _show_classes(console, summary["classes"])
        _show_rows(console, inputs.schedule.examples, inputs.tokenizer, options.rows)
        _show_warnings(console, summary["warnings"])
    write_json(options.json, summary)
    bad = sum(part["bad"] for part in summary["parts"].values())
    if bad and config.data.on_error == "raise":
        raise UserError(
            f"{bad} bad rows: training stops at the first. Correct them, or set data.on_error=skip "
            "to leave them out."
        )


def _summarize(inputs: "Inputs") -> dict[str, Any]:
    """Return what `--json` writes."""
    from jaxtune.data.inspect import (
        compute_statistics,
        count_classes,
        count_overlap,
        find_warnings,
    )

    train, held_out = inputs.schedule.examples, inputs.eval_schedule
    parts = {name: compute_statistics(schedule) for name, schedule in inputs.schedules.items()}
    overlap = count_overlap(train, held_out.examples) if held_out else None
    classes = count_classes(train, inputs.tokenizer)
    warnings = find_warnings(parts, overlap, classes)
    return {"parts": parts, "overlap": overlap, "classes": classes, "warnings": warnings}


def _show_part(console: "Console", name: str, part: dict[str, Any]) -> None:
    title = {"train": "Training data", "eval": "Evaluation data"}[name]
    console.print(visible(f"{title}: {part['source']}"), style="bold", markup=False)
    packed = "packed rows" if part["packing"] else "padded rows"
    dropped = part["dropped"] + part["bad"]
    lines = [
        ("format", part["format"]),
        (
            "rows",
            f"{part['rows']:,} read, {part['examples']:,} examples, {part['truncated']:,} "
            f"truncated, {dropped:,} left out",
        ),
        ("duplicates", f"{part['duplicates']:,}"),
        (
            "tokens",
            f"{part['tokens']:,}, of which {part['supervised_tokens']:,} supervised "
            f"({part['supervised_share']:.1%})",
        ),
        (
            packed,
            f"{part['packing_efficiency']:.1%} full; {part['batches']:,} batches an epoch, "
            f"{part['steps']:,} steps",
        ),
    ]
    for label, text in lines:
        console.print(visible(f"  {label:<12} {text}"), markup=False)
    _show_lengths(console, part["lengths"])
    reasons = {
        "truncated": "cut off by data.max_length",
        "cut_off": "left out: the answer lies beyond data.max_length",
        "unanswered": "left out: nothing is supervised", "bad": "bad",
    }  # fmt: skip
    for kind, rows in part["places"].items():
        console.print(f"  {rows['count']:,} rows {reasons[kind]}:", markup=False)
        for location in rows["first"][:_MAX_LOCATIONS]:
            console.print(visible(f"    {location}"), markup=False)
        if (more := rows["count"] - _MAX_LOCATIONS) > 0:
            console.print(f"    and {more:,} more (see --json FILE)", markup=False)
    console.print()


def _show_lengths(console: "Console", lengths: dict[str, list[int]]) -> None:
    """Print a bar for each range of lengths; no bar of a range with examples is empty."""
    most = max(lengths["counts"])
    console.print("  tokens per example")
    for low, high, count in zip(
        lengths["edges"], lengths["edges"][1:], lengths["counts"], strict=False
    ):
        eighths = max(round(8 * _WIDTH * count / most), 1) if count else 0
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        console.print(f"  {low + 1:>6,} to {high:<6,} {bar} {count:,}", markup=False)


def _show_classes(console: "Console", classes: list[tuple[str, int]]) -> None:
    if classes:
        counts = ", ".join(f"{name!r} {count:,}" for name, count in classes)
        console.print(visible(f"Answers: {counts}"), markup=False)
        console.print()


def _show_rows(
    console: "Console", examples: "Examples", tokenizer: "Tokenizer", count: int
) -> None:
    """Print the first examples, decoded: supervised tokens in color, else in brackets."""
    from rich.text import Text

    from jaxtune.data.inspect import split_text

    colored = console.is_terminal and not console.no_color
    marks = "in green" if colored else "between ⟦ and ⟧"
    for number in range(min(count, len(examples.items))):
        console.print(
            f"Example {number + 1} ({examples.lengths[number]:,} tokens are fed), supervised "
            f"tokens {marks}:",
            style="bold",
        )
        text = Text()
        for piece in split_text(examples, number, tokenizer):
            shown = visible(piece.text)
            if len(shown) > _MAX_CHARACTERS:
                shown = f"{shown[:_MAX_CHARACTERS]} ..."
            if piece.supervised:
                text.append(shown if colored else f"⟦{shown}⟧", style="bold green")
            else:
                text.append(shown, style="dim")
        console.print(text)
        console.print()


def _show_warnings(console: "Console", warnings: list[str]) -> None:
    for line in warnings:
        console.print(visible(f"Warning: {line}"), style="yellow", markup=False)
    if not warnings:
        console.print("Nothing looks wrong.")
