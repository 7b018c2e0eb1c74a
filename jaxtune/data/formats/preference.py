"""SequenceLogProbs to be compared: pairs of a preferred and a rejected one, or single ones that
are marked good or bad.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.examples import Examples, Lazy, Places, SourceShare, TruncatedExamples, Windows
from jaxtune.data.formats.conversation import Conversation, conversation, preference
from jaxtune.data.sources.row import Row, RowError
from jaxtune.data.store import BAD, GOOD, Store

Comparison = Literal["pairs", "labels"]
"""What an objective compares: two answers to one prompt, or answers with labels (a pair being
one good and one bad).
"""

LABEL = "label"


@dataclass(frozen=True)
class Compared:
    """Two answers that are fed side by side.

    Attributes:
        parts: each with its prompt.
        labels: what each is; see `objectives.objective`.

    """

    parts: tuple[Example, Example]
    labels: tuple[int, int]

    @property
    def ids(self) -> np.ndarray:
        """Tokens of the first of them."""
        return self.parts[0].ids


def answers_of(
    row: Row, kind: str, columns: Mapping[str, str], comparison: Comparison
) -> list[Conversation]:
    """The answers of a row, each with its prompt and what it is.

    Raises:
        RowError: neither a pair, nor an answer with a label where those will do.

    """
    if "chosen" in row.value or "chosen" in columns or kind == "preference":
        pair = preference(row, columns)
        if pair[0].answer == pair[1].answer:
            raise RowError(row.place, "'chosen' and 'rejected' are the same answer.")
        return [
            replace(found, label=label)
            for found, label in zip(pair, (CHOSEN, REJECTED), strict=True)
        ]
    if comparison == "pairs":
        raise RowError(
            row.place,
            "no pair of answers. The objective needs 'prompt', 'chosen' and 'rejected' (see "
            "data.columns).",
        )
    good = row.value.get(columns.get(LABEL, LABEL))
    if good not in (True, False, 0, 1):
        raise RowError(
            row.place,
            f"'{LABEL}' must be true for a good answer or false for a bad one, or there must be "
            "'chosen' and 'rejected'.",
        )
    others = {key: column for key, column in columns.items() if key != LABEL}
    return [replace(conversation(row, kind, columns=others), label=CHOSEN if good else REJECTED)]


def compared(
    store: Store,
    chosen: np.ndarray,
    max_length: int,
    name: str,
    comparison: Comparison,
    weight: float = 1.0,
) -> Examples:
    """The comparisons of a store; arguments as in `examples.cut`, `max_length` being that of each
    answer with its prompt.

    For labels each answer is accompanied by one of another row to the same prompt, for KTO's
    estimate of the model's distance from its reference.
    """
    windows = Windows(store, chosen, max_length)
    found = TruncatedExamples(store, windows.document, windows.first, windows.stop)
    records = store.documents[windows.document]
    if comparison == "pairs":
        first = _pairs(windows.document, records)
        items: Any = _Pairs(found, first)
        lengths = windows.lengths[first] + windows.lengths[first + 1]
        supervised = windows.supervised[first] + windows.supervised[first + 1]
    else:
        items = _Labelled(
            found, (records["marks"] & GOOD) > 0, _others(records["prompt"]), max_length
        )
        prompts = windows.lengths - windows.supervised
        theirs = np.minimum(windows.supervised[items.others], max_length - prompts)
        lengths, supervised = 2 * prompts + windows.supervised + theirs, windows.supervised + theirs
    lines = np.unique(store.documents[["file", "line"]][chosen])
    store.let_go()
    return Examples(
        name,
        items,
        lengths,
        supervised,
        (SourceShare(len(lengths), weight),),
        rows=len(lines),
        formats=(store.about["format"],),
        truncated=Places(store, windows.truncated),
        unanswered=Places(store, windows.unanswered),
        cut_off=Places(store, windows.cut_off),
        bad=store.about["bad"],
        stores=((store, chosen),),
        digest=f"{store.about['digest']}:{len(chosen)}:{int(chosen.sum())}:{comparison}",
        compared=True,
    )


def _pairs(documents: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Where a good answer is followed by the bad one of its row; one whose other half is left
    out is left out too.
    """
    good, bad = (records["marks"] & GOOD) > 0, (records["marks"] & BAD) > 0
    same = (
        (np.diff(documents) == 1)
        & (np.diff(records["line"]) == 0)
        & (np.diff(records["file"]) == 0)
    )
    return np.flatnonzero(good[:-1] & bad[1:] & same)


def _others(prompts: np.ndarray) -> np.ndarray:
    """For each answer another one, to another prompt where that can be had at once."""
    count = len(prompts)
    far, next_one = ((np.arange(count) + count // 2 + step) % max(count, 1) for step in (0, 1))
    return np.where(prompts[far] == prompts, next_one, far)


@dataclass(frozen=True)
class _Pairs(Lazy):
    """Pairs read from a store when they are asked for; `first` are the places of the preferred
    answers.
    """

    answers: Sequence[Example]
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def at(self, index: int) -> Compared:
        place = int(self.first[index])
        return Compared((self.answers[place], self.answers[place + 1]), (CHOSEN, REJECTED))


@dataclass(frozen=True)
class _Labelled(Lazy):
    """SequenceLogProbs with labels, each with another row's answer to its prompt."""

    answers: Sequence[Example]
    good: np.ndarray
    others: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.good)

    def at(self, index: int) -> Compared:
        ours, theirs = self.answers[index], self.answers[int(self.others[index])]
        begin = int(np.flatnonzero(ours.weights)[0])
        answer = slice(
            int(np.flatnonzero(theirs.weights)[0]), int(np.flatnonzero(theirs.weights)[-1]) + 1
        )
        ids = np.concatenate([ours.ids[:begin], theirs.ids[answer]])[: self.max_length + 1]
        weights = np.concatenate([np.zeros(begin, np.float32), theirs.weights[answer]])[
            : self.max_length + 1
        ]
        label = CHOSEN if self.good[index] else REJECTED
        return Compared((ours, Example(ids, weights)), (label, MISMATCHED))
