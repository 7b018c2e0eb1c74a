"""What a run will train on, in numbers and in rows, and what looks wrong with it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.comparisons import AnswerPair
from jaxtune.data.examples import Examples
from jaxtune.data.loader import BatchSchedule
from jaxtune.data.store import NOT_ENDED, TWO_BOS

_BINS, _MOST_LISTED = 12, 10_000
_LABELS = {CHOSEN: "good", REJECTED: "bad", MISMATCHED: "another row's answer"}
_MOST_CLASSES, _ROWS_A_CLASS, _IMBALANCE = 50, 3, 5.0


@dataclass(frozen=True)
class TextPiece:
    """Consecutive tokens of an example that are all supervised, or all not."""

    text: str
    supervised: bool


def compute_statistics(schedule: BatchSchedule) -> dict[str, Any]:
    """Return counts, shares and the histogram of lengths of one part of the data."""
    examples, summary = schedule.examples, schedule.examples.summary()
    rows = _record_field(examples, "row")
    return {
        **summary,
        "supervised_share": round(summary["supervised_tokens"] / max(summary["tokens"], 1), 4),
        "packing": schedule.layout.packing,
        "packing_efficiency": round(schedule.efficiency(), 4),
        "batches": len(schedule.epoch_schedule(0)),
        "steps": len(schedule),
        "duplicates": len(rows) - len(np.unique(rows)),
        "begin_with_two_bos": _count_marked(examples, TWO_BOS),
        "not_ended": _count_marked(examples, NOT_ENDED),
        "rewritten": examples.rewritten,
        "lengths": length_histogram(examples.lengths),
        "places": {
            name: {"count": len(locations), "first": list(locations[:_MOST_LISTED])}
            for name in ("truncated", "cut_off", "unanswered", "bad")
            if len(locations := getattr(examples, name))
        },
    }


def count_overlap(train: Examples, held_out: Examples) -> dict[str, int]:
    """Count the evaluation rows that are also trained on: the same row, or another answer to the
    same prompt.
    """
    same = np.isin(_record_field(held_out, "row"), _record_field(train, "row"))
    prompt = np.isin(_record_field(held_out, "prompt"), _record_field(train, "prompt"))
    return {"rows": int(same.sum()), "prompts": int((prompt & ~same).sum())}


def find_warnings(
    parts: dict[str, dict[str, Any]],
    overlap: dict[str, int] | None,
    classes: list[tuple[str, int]],
) -> list[str]:
    """Return what looks wrong, one line each, with what to do.

    Args:
        parts: the `compute_statistics` of `train` and, where there is one, `eval`.
        overlap: see `count_overlap`.
        classes: see `count_classes`.

    """
    lines = [line for name, part in parts.items() for line in _warnings_of_part(name, part)]
    if overlap and overlap["rows"]:
        lines.append(
            f"{overlap['rows']:,} evaluation rows are also trained on: what is measured on them "
            "says nothing about new rows."
        )
    if overlap and overlap["prompts"]:
        lines.append(
            f"{overlap['prompts']:,} evaluation rows have a prompt that is trained on with another "
            "answer."
        )
    if classes and classes[0][1] > _IMBALANCE * classes[-1][1]:
        (most, many), (least, few) = classes[0], classes[-1]
        lines.append(
            f"train: the classes are imbalanced: {many:,} rows answer {most!r}, {few:,} answer "
            f"{least!r}."
        )
    return lines


def _warnings_of_part(name: str, part: dict[str, Any]) -> list[str]:
    lines = []
    count, rows = part["examples"], part["rows"]
    if part["not_ended"]:
        lines.append(
            f"{name}: in {part['not_ended']:,} of {count:,} examples the end of turn is not "
            "supervised, so the model is not taught to stop. "
            "The chat template puts no special token behind an answer, or marks the answer "
            "without it."
        )
    if part["begin_with_two_bos"]:
        lines.append(
            f"{name}: {part['begin_with_two_bos']:,} examples begin with BOS twice. Take it "
            "out of the rows' text or of the template."
        )
    lost = part["truncated"]
    if lost and lost >= rows:
        lines.append(
            f"{name}: every row is longer than data.max_length; no answer is trained to its "
            "end. Raise data.max_length."
        )
    elif lost:
        lines.append(
            f"{name}: the answers of {lost:,} of {rows:,} rows are cut off by "
            "data.max_length, and are not trained to their end."
        )
    if part["dropped"]:
        lines.append(
            f"{name}: {part['dropped']:,} rows are left out: nothing of them is supervised "
            "within data.max_length."
        )
    if part["bad"]:
        lines.append(f"{name}: {part['bad']:,} bad rows are left out.")
    if part["duplicates"]:
        lines.append(f"{name}: {part['duplicates']:,} rows repeat an earlier one.")
    if part["rewritten"]:
        lines.append(
            f"{name}: the chat template rewrites earlier turns of {part['rewritten']:,} rows; "
            "each answer is an example of its own."
        )
    return lines


def count_classes(examples: Examples, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Return the answers and how many rows give each, the most frequent first; nothing unless they
    are few and repeated.
    """
    answers = _record_field(examples, "answer")
    _, first, counts = np.unique(answers, return_index=True, return_counts=True)
    if not 2 <= len(counts) <= min(_MOST_CLASSES, len(answers) // _ROWS_A_CLASS):
        return []
    order = np.argsort(-counts, kind="stable")
    return [
        (_answer_text(examples, int(first[number]), tokenizer), int(counts[number]))
        for number in order
    ]


def split_text(examples: Examples, number: int, tokenizer: Tokenizer) -> list[TextPiece]:
    """Return an example as text, split where supervised tokens begin and end; answers that are
    compared follow each other.
    """
    item = examples.items[number]
    if not isinstance(item, AnswerPair):
        return _split_example(item, tokenizer)
    pieces = []
    for answer, label in zip(item.answers, item.labels, strict=True):
        heading = TextPiece(f"\n[{_LABELS[label]}]\n", False)
        pieces += heading, *_split_example(answer, tokenizer)
    return pieces


def _split_example(example: Example, tokenizer: Tokenizer) -> list[TextPiece]:
    supervised = example.supervised
    borders = np.flatnonzero(np.diff(supervised)) + 1
    return [
        TextPiece(
            tokenizer.decode(
                ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            bool(mask[0]),
        )
        for ids, mask in zip(
            np.split(example.ids, borders), np.split(supervised, borders), strict=True
        )
    ]


def length_histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Return `edges` at round numbers, and the `counts` between each two of them, the upper edge
    included.
    """
    least, longest = int(lengths.min()) - 1, int(lengths.max())
    steps = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    step = next(step for step in steps if longest - least // step * step <= _BINS * step)
    edges = list(range(least // step * step, longest + step, step))
    counts, _ = np.histogram(lengths - 1, bins=edges)
    return {"edges": edges, "counts": counts.tolist()}


def _record_field(examples: Examples, name: str) -> np.ndarray:
    """Return a field of all documents that are used."""
    fields = (store.documents[name][documents] for store, documents in examples.stores)
    return np.concatenate([np.zeros(0, np.uint64), *fields])


def _count_marked(examples: Examples, mark: int) -> int:
    return sum(
        int(np.count_nonzero(store.documents["marks"][documents] & mark))
        for store, documents in examples.stores
    )


def _answer_text(examples: Examples, number: int, tokenizer: Tokenizer) -> str:
    """Return the last supervised tokens of a document, counted over all stores, as text."""
    for store, documents in examples.stores:
        if number >= len(documents):
            number -= len(documents)
            continue
        index = int(documents[number])
        ends = store.documents["spans"]
        if ends[index] == (ends[index - 1] if index else 0):
            return ""
        span = store.spans[int(ends[index]) - 1]
        start = int(store.documents["tokens"][index - 1]) if index else 0
        ids = store.read(start + span["begin"], start + span["end"]).tolist()
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
    return ""
