"""What a run will train on, in numbers and in rows, and what looks wrong with it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.examples import Examples
from jaxtune.data.formats.preference import Compared
from jaxtune.data.loader import BatchSchedule
from jaxtune.data.store import NOT_ENDED, TWO_BOS

_BINS, _LISTED = 12, 10_000
LABELS = {CHOSEN: "good", REJECTED: "bad", MISMATCHED: "another row's answer"}
_MOST_CLASSES, _ROWS_A_CLASS, _IMBALANCE = 50, 3, 5.0


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of an example that are all supervised, or all not."""

    text: str
    supervised: bool


def figures(plan: BatchSchedule) -> dict[str, Any]:
    """Counts, shares and the histogram of lengths of one part of the data."""
    examples = plan.examples
    found = examples.summary()
    rows = _records(examples, "row")
    epoch = plan.epoch_plan(0)
    return {
        **found,
        "supervised_share": round(found["supervised_tokens"] / max(found["tokens"], 1), 4),
        "packing": plan.layout.packing,
        "packing_efficiency": round(plan.efficiency(), 4),
        "batches": len(epoch),
        "steps": len(plan),
        "duplicates": len(rows) - len(np.unique(rows)),
        "begin_with_two_bos": _marked(examples, TWO_BOS),
        "not_ended": _marked(examples, NOT_ENDED),
        "rewritten": examples.rewritten,
        "lengths": histogram(examples.lengths),
        "places": {
            name: {"count": len(places), "first": list(places[:_LISTED])}
            for name in ("truncated", "cut_off", "unanswered", "bad")
            if len(places := getattr(examples, name))
        },
    }


def overlap(train: Examples, held_out: Examples) -> dict[str, int]:
    """Evaluation rows that are also trained on: the same row, or another answer to the same
    prompt.
    """
    same = np.isin(_records(held_out, "row"), _records(train, "row"))
    prompt = np.isin(_records(held_out, "prompt"), _records(train, "prompt"))
    return {"rows": int(same.sum()), "prompts": int((prompt & ~same).sum())}


def warnings(
    parts: dict[str, dict[str, Any]], common: dict[str, int] | None, labels: list[tuple[str, int]]
) -> list[str]:
    """What looks wrong, one line each, with what to do.

    Args:
        parts: the figures of `train` and, where there is one, `eval`.
        common: see `overlap`.
        labels: see `classes`.

    """
    found = []
    for name, part in parts.items():
        count, rows = part["examples"], part["rows"]
        if part["not_ended"]:
            found.append(
                f"{name}: in {part['not_ended']:,} of {count:,} examples the end of turn is not "
                "supervised, so the model is not taught to stop. "
                "The chat template puts no special token behind an answer, or marks the answer "
                "without it."
            )
        if part["begin_with_two_bos"]:
            found.append(
                f"{name}: {part['begin_with_two_bos']:,} examples begin with BOS twice. Take it "
                "out of the rows' text or of the template."
            )
        lost = part["truncated"]
        if lost and lost >= rows:
            found.append(
                f"{name}: every row is longer than data.max_length; no answer is trained to its "
                "end. Raise data.max_length."
            )
        elif lost:
            found.append(
                f"{name}: the answers of {lost:,} of {rows:,} rows are cut off by "
                "data.max_length, and are not trained to their end."
            )
        if part["dropped"]:
            found.append(
                f"{name}: {part['dropped']:,} rows are left out: nothing of them is supervised "
                "within data.max_length."
            )
        if part["bad"]:
            found.append(f"{name}: {part['bad']:,} bad rows are left out.")
        if part["duplicates"]:
            found.append(f"{name}: {part['duplicates']:,} rows repeat an earlier one.")
        if part["rewritten"]:
            found.append(
                f"{name}: the chat template rewrites earlier turns of {part['rewritten']:,} rows; "
                "each answer is an example of its own."
            )
    if common and common["rows"]:
        found.append(
            f"{common['rows']:,} evaluation rows are also trained on: what is measured on them "
            "says nothing about new rows."
        )
    if common and common["prompts"]:
        found.append(
            f"{common['prompts']:,} evaluation rows have a prompt that is trained on with another "
            "answer."
        )
    if labels and labels[0][1] > _IMBALANCE * labels[-1][1]:
        (most, many), (least, few) = labels[0], labels[-1]
        found.append(
            f"train: the classes are imbalanced: {many:,} rows answer {most!r}, {few:,} answer "
            f"{least!r}."
        )
    return found


def classes(examples: Examples, tokenizer: Any) -> list[tuple[str, int]]:
    """The answers and how many rows give each, the most frequent first, where they are few and
    repeated; else nothing.
    """
    answers = _records(examples, "answer")
    _, first, counts = np.unique(answers, return_index=True, return_counts=True)
    if not 2 <= len(counts) <= min(_MOST_CLASSES, len(answers) // _ROWS_A_CLASS):
        return []
    order = np.argsort(-counts, kind="stable")
    return [
        (_answer(examples, int(first[number]), tokenizer), int(counts[number])) for number in order
    ]


def pieces(examples: Examples, number: int, tokenizer: Any) -> list[Piece]:
    """An example as text, cut where supervised tokens begin and end; of answers that are
    compared one after the other.
    """
    item = examples.items[number]
    if not isinstance(item, Compared):
        return _pieces(item, tokenizer)
    return [
        piece
        for part, label in zip(item.parts, item.labels, strict=True)
        for piece in (Piece(f"\n[{LABELS[label]}]\n", False), *_pieces(part, tokenizer))
    ]


def _pieces(example: Example, tokenizer: Any) -> list[Piece]:
    borders = np.flatnonzero(np.diff(example.supervised)) + 1
    return [
        Piece(
            tokenizer.decode(
                ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            bool(chosen[0]),
        )
        for ids, chosen in zip(
            np.split(example.ids, borders), np.split(example.supervised, borders), strict=True
        )
    ]


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """`edges` at round numbers, and the `counts` between each two of them, the upper edge
    included.
    """
    least, longest = int(lengths.min()) - 1, int(lengths.max())
    steps = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    step = next(step for step in steps if longest - least // step * step <= _BINS * step)
    edges = list(range(least // step * step, longest + step, step))
    counts, _ = np.histogram(lengths - 1, bins=edges)
    return {"edges": edges, "counts": counts.tolist()}


def _records(examples: Examples, name: str) -> np.ndarray:
    """A field of all documents that were chosen."""
    return np.concatenate(
        [
            np.zeros(0, np.uint64),
            *(store.documents[name][chosen] for store, chosen in examples.stores),
        ]
    )


def _marked(examples: Examples, mark: int) -> int:
    return sum(
        int(np.count_nonzero(store.documents["marks"][chosen] & mark))
        for store, chosen in examples.stores
    )


def _answer(examples: Examples, document: int, tokenizer: Any) -> str:
    """The last supervised tokens of a document, counted over all stores, as text."""
    for store, chosen in examples.stores:
        if document >= len(chosen):
            document -= len(chosen)
            continue
        index = int(chosen[document])
        ends = store.documents["spans"]
        if ends[index] == (ends[index - 1] if index else 0):
            return ""
        span = store.spans[int(ends[index]) - 1]
        start = int(store.documents["tokens"][index - 1]) if index else 0
        return tokenizer.decode(
            store.read(start + span["begin"], start + span["end"]).tolist(),
            skip_special_tokens=True,
        ).strip()
    return ""
