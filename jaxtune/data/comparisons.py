"""Examples of objectives that compare answers: each item is two answers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.examples import (
    Examples,
    LazySequence,
    RowLocations,
    SourceShare,
    TruncatedExamples,
    Windows,
)
from jaxtune.data.formats.answers import AnswerComparison
from jaxtune.data.store import BAD, GOOD, Store


@dataclass(frozen=True)
class AnswerPair:
    """Two answers that are fed side by side.

    Attributes:
        answers: each with its prompt.
        labels: what each is: `CHOSEN`, `REJECTED` or `MISMATCHED` of `batch`.

    """

    answers: tuple[Example, Example]
    labels: tuple[int, int]

    @property
    def ids(self) -> np.ndarray:
        """Return the tokens of the first of them."""
        return self.answers[0].ids


def build_comparisons(
    store: Store,
    documents: np.ndarray,
    max_length: int,
    name: str,
    comparison: AnswerComparison,
    weight: float = 1.0,
) -> Examples:
    """Build the comparisons of a store.

    For labels each answer is accompanied by one of another row to the same prompt, for KTO's
    estimate of the model's distance from its reference.

    Args:
        store: tokenized rows.
        documents: indices of the documents to use.
        max_length: most tokens of each answer with its prompt; see `examples.build_examples`.
        name: what the user named.
        comparison: what the objective compares.
        weight: passes over them in an epoch.

    """
    windows = Windows(store, documents, max_length)
    answers = TruncatedExamples(store, windows.document, windows.first, windows.stop)
    records = store.documents[windows.document]
    items: Any
    if comparison == "pairs":
        first = _first_of_pairs(windows.document, records)
        items = _Pairs(answers, first)
        lengths = windows.lengths[first] + windows.lengths[first + 1]
        supervised = windows.supervised[first] + windows.supervised[first + 1]
    else:
        good = (records["marks"] & GOOD) > 0
        items = _Labeled(answers, good, _mismatched_with(records["prompt"]), max_length)
        prompts = windows.lengths - windows.supervised
        mismatched = np.minimum(windows.supervised[items.mismatched], max_length - prompts)
        lengths = 2 * prompts + windows.supervised + mismatched
        supervised = windows.supervised + mismatched
    lines = np.unique(store.documents[["file", "line"]][documents])
    store.release()
    digest = f"{store.manifest['digest']}:{len(documents)}:{int(documents.sum())}:{comparison}"
    return Examples(
        name,
        items,
        lengths,
        supervised,
        (SourceShare(len(lengths), weight),),
        rows=len(lines),
        formats=(store.manifest["format"],),
        truncated=RowLocations(store, windows.truncated),
        unanswered=RowLocations(store, windows.unanswered),
        cut_off=RowLocations(store, windows.cut_off),
        bad=store.manifest["bad"],
        stores=((store, documents),),
        digest=digest,
        paired=True,
    )


def _first_of_pairs(documents: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Return the indices of good answers that the bad one of their row follows; an answer whose
    other half is left out is left out too.
    """
    good, bad = (records["marks"] & GOOD) > 0, (records["marks"] & BAD) > 0
    same = (
        (np.diff(documents) == 1)
        & (np.diff(records["line"]) == 0)
        & (np.diff(records["file"]) == 0)
    )
    return np.flatnonzero(good[:-1] & bad[1:] & same)


def _mismatched_with(prompts: np.ndarray) -> np.ndarray:
    """Return for each answer the index of the one half the data away, or of the next where that one
    answers the same prompt.
    """
    count = len(prompts)
    far, next_to_far = ((np.arange(count) + count // 2 + step) % max(count, 1) for step in (0, 1))
    return np.where(prompts[far] == prompts, next_to_far, far)


@dataclass(frozen=True)
class _Pairs(LazySequence):
    """Pairs read from a store when they are asked for; `first` are the indices of the preferred
    answers.
    """

    answers: Sequence[Example]
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def at(self, index: int) -> AnswerPair:
        preferred = int(self.first[index])
        return AnswerPair(
            (self.answers[preferred], self.answers[preferred + 1]), (CHOSEN, REJECTED)
        )


@dataclass(frozen=True)
class _Labeled(LazySequence):
    """Answers with labels, each with another row's answer to its prompt."""

    answers: Sequence[Example]
    good: np.ndarray
    mismatched: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.good)

    def at(self, index: int) -> AnswerPair:
        own, other = self.answers[index], self.answers[int(self.mismatched[index])]
        begin = int(np.flatnonzero(own.weights)[0])
        supervised = np.flatnonzero(other.weights)
        answer = slice(int(supervised[0]), int(supervised[-1]) + 1)
        ids = np.concatenate([own.ids[:begin], other.ids[answer]])
        weights = np.concatenate([np.zeros(begin, np.float32), other.weights[answer]])
        kept = slice(self.max_length + 1)
        label = CHOSEN if self.good[index] else REJECTED
        return AnswerPair((own, Example(ids[kept], weights[kept])), (label, MISMATCHED))
