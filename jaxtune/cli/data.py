"""What will be trained on: counts, lengths, packing, what looks wrong, and the first rows with
their supervised tokens.

jaxtune data CONFIG.yaml [key=value ...]
jaxtune data --model MODEL --data FILE [key=value ...]
"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from jaxtune.data.examples import Examples

_WIDTH = 40
_PLACES = 10
_LONGEST_ROW = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_config, add_json

    add_config(parser)
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Tokenize, and show."""
    from rich.console import Console

    from jaxtune.cli.options import config_of, write_json
    from jaxtune.core import runtime
    from jaxtune.core.errors import UserError
    from jaxtune.data.inspect import (
        compute_statistics,
        count_classes,
        count_overlap,
        find_warnings,
    )
    from jaxtune.tracking.progress import Reporter
    from jaxtune.training.inputs import read_inputs

    runtime.start()
    config = config_of(options)
    lenient = config.model_copy(
        update={"data": config.data.model_copy(update={"on_error": "skip"})}
    )
    inputs = read_inputs(lenient, Reporter())
    tokenizer, plans = inputs.tokenizer, inputs.schedules
    parts = {name: compute_statistics(plan) for name, plan in plans.items()}
    common = (
        count_overlap(plans["train"].examples, plans["eval"].examples) if "eval" in plans else None
    )
    labels = count_classes(plans["train"].examples, tokenizer)
    found = {
        "parts": parts,
        "overlap": common,
        "classes": labels,
        "warnings": find_warnings(parts, common, labels),
    }
    if options.json != "-":
        console = Console(highlight=False, soft_wrap=True)
        for name, part in parts.items():
            _show_part(console, name, part)
        _show_classes(console, labels)
        _show_rows(console, plans["train"].examples, tokenizer, options.rows)
        _show_warnings(console, found["warnings"])
    write_json(options.json, found)
    bad = sum(part["bad"] for part in parts.values())
    if bad and config.data.on_error == "raise":
        raise UserError(
            f"{bad} bad rows: training stops at the first. Mend them, or set data.on_error=skip "
            "to leave them out."
        )


def _show_part(console: "Console", name: str, part: dict[str, Any]) -> None:
    title = {"train": "Training data", "eval": "Evaluation data"}[name]
    console.print(f"{title}: {part['source']}", style="bold", markup=False)
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
        console.print(f"  {label:<12} {text}", markup=False)
    _show_lengths(console, part["lengths"])
    reasons = {
        "truncated": "cut off by data.max_length",
        "cut_off": "left out: the answer lies beyond data.max_length",
        "unanswered": "left out: nothing is supervised", "bad": "bad",
    }  # fmt: skip
    for kind, places in part["places"].items():
        console.print(f"  {places['count']:,} rows {reasons[kind]}:", markup=False)
        for place in places["first"][:_PLACES]:
            console.print(f"    {place}", markup=False)
        if places["count"] > _PLACES:
            console.print(
                f"    and {places['count'] - _PLACES:,} more (see --json FILE)", markup=False
            )
    console.print()


def _show_lengths(console: "Console", lengths: dict[str, list[int]]) -> None:
    """A bar for each range of lengths; one that holds anything is never empty."""
    most = max(lengths["counts"])
    console.print("  tokens per example")
    for low, high, count in zip(
        lengths["edges"], lengths["edges"][1:], lengths["counts"], strict=False
    ):
        eighths = max(round(8 * _WIDTH * count / most), 1) if count else 0
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        console.print(f"  {low + 1:>6,} to {high:<6,} {bar} {count:,}", markup=False)


def _show_classes(console: "Console", labels: list[tuple[str, int]]) -> None:
    if labels:
        console.print(
            "Answers: " + ", ".join(f"{name!r} {count:,}" for name, count in labels),
            markup=False,
        )
        console.print()


def _show_rows(console: "Console", examples: "Examples", tokenizer: Any, count: int) -> None:
    """The first examples, decoded; supervised tokens in color, or between brackets where there
    is no color.
    """
    from rich.text import Text

    from jaxtune.data.inspect import split_text

    colored = console.is_terminal and not console.no_color
    how = "in green" if colored else "between ⟦ and ⟧"
    for number in range(min(count, len(examples.items))):
        console.print(
            f"Example {number + 1} ({examples.lengths[number]:,} tokens are fed), supervised "
            f"tokens {how}:",
            style="bold",
        )
        text = Text()
        for piece in split_text(examples, number, tokenizer):
            shown = (
                piece.text
                if len(piece.text) <= _LONGEST_ROW
                else f"{piece.text[:_LONGEST_ROW]} ..."
            )
            if piece.supervised:
                text.append(shown if colored else f"⟦{shown}⟧", style="bold green")
            else:
                text.append(shown, style="dim")
        console.print(text)
        console.print()


def _show_warnings(console: "Console", found: list[str]) -> None:
    for line in found:
        console.print(f"Warning: {line}", style="yellow", markup=False)
    if not found:
        console.print("Nothing looks wrong.")
