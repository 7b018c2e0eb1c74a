"""The examples of a source: tokenized rows cut to length, with an account of what was cut or
left out.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.chat.tokenize import Example
from jaxtune.data.store import REWRITTEN, TEXT, Store

_BLOCK = 1 << 17  # documents looked at together, so that what is made on the way stays small


class SourceShare(NamedTuple):
    """Consecutive examples of one source, and how often an epoch shows them."""

    count: int
    weight: float


@dataclass(frozen=True)
class Examples:
    """Examples ready for training: cut to length, each with at least one supervised token.

    Attributes:
        source: what the user named.
        items: the examples in the order of their rows.
        lengths: positions that each takes in a row: up to the one that predicts its last supervised
            token.
        supervised: supervised tokens of each.
        parts: how many of them come from each source, and the sources' weights.
        rows: rows read.
        formats: the format of each source.
        truncated: places of rows that lost supervised tokens to the cut.
        unanswered: places of rows that have nothing supervised at all.
        cut_off: places of rows whose answers lie wholly beyond the cut.
        bad: what is wrong with rows that were left out, each with its place.
        rewritten: rows cut into one example an answer, because the template rewrites earlier turns.
        stores: the tokenized sources, with the documents of each that were chosen.
        digest: changes when the tokens change.
        compared: whether the items are answers side by side (`preference.Compared`).

    """

    source: str
    items: Sequence[Any]
    lengths: np.ndarray
    supervised: np.ndarray
    parts: tuple[SourceShare, ...]
    rows: int = 0
    formats: tuple[str, ...] = ()
    truncated: Sequence[str] = ()
    unanswered: Sequence[str] = ()
    cut_off: Sequence[str] = ()
    bad: Sequence[str] = ()
    rewritten: int = 0
    stores: tuple[tuple[Store, np.ndarray], ...] = field(default=(), repr=False)
    digest: str = ""
    compared: bool = False

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 where there is none."""
        return max((store.about["largest_token"] for store, _ in self.stores), default=-1)

    @property
    def kinds(self) -> set[str]:
        """What the rows are: `chat`, `plain` (a prompt and its completion) or `text`."""
        return {kind for store, _ in self.stores for kind in store.about["kinds"]}

    def summary(self) -> dict[str, Any]:
        """Counts for the terminal, `data.json` and the report."""
        return {
            "source": self.source,
            "format": ", ".join(dict.fromkeys(self.formats)),
            "rows": self.rows,
            "examples": len(self.items),
            "truncated": len(self.truncated),
            "dropped": len(self.unanswered) + len(self.cut_off),
            "bad": len(self.bad),
            "tokens": int(self.lengths.sum()),
            "supervised_tokens": int(self.supervised.sum()),
            "longest": int(self.lengths.max()),
        }


def fed_length(example: Example) -> int:
    """Tokens fed of an example: what follows its last supervised token can change no loss and is
    not fed.
    """
    return int(np.flatnonzero(example.weights)[-1])


def in_memory(items: Sequence[Example], source: str = "memory") -> Examples:
    """Examples that were made elsewhere."""
    lengths = np.array([fed_length(item) for item in items], np.int64)
    supervised = np.array([np.count_nonzero(item.weights[1:]) for item in items], np.int64)
    return Examples(
        source, items, lengths, supervised, (SourceShare(len(items), 1.0),), rows=len(items)
    )


def cut(
    store: Store, chosen: np.ndarray, max_length: int, name: str, weight: float = 1.0
) -> Examples:
    """The examples of a store.

    A conversation is cut at the end. A text goes on in the next example, which begins with the
    token the last one ended on, so that each of its tokens is predicted once.

    Args:
        store: tokenized rows.
        chosen: which of its documents to take.
        max_length: tokens of an example at most; so many are fed and, from the second on,
            predicted.
        name: what the user named.
        weight: passes over them in an epoch.

    """
    windows = Windows(store, chosen, max_length)
    return Examples(
        name,
        TruncatedExamples(store, windows.document, windows.first, windows.stop),
        windows.lengths,
        windows.supervised,
        (SourceShare(len(windows.lengths), weight),),
        rows=windows.rows,
        formats=(store.about["format"],),
        truncated=Places(store, windows.truncated),
        unanswered=Places(store, windows.unanswered),
        cut_off=Places(store, windows.cut_off),
        bad=store.about["bad"],
        rewritten=windows.rewritten,
        stores=((store, chosen),),
        digest=f"{store.about['digest']}:{len(chosen)}:{int(chosen.sum())}",
    )


def joined(examples: Sequence[Examples]) -> Examples:
    """The examples of several sources, one source after the other."""
    if len(examples) == 1:
        return examples[0]

    def chain(name: str) -> Any:
        return _Chain([getattr(part, name) for part in examples])

    return Examples(
        ", ".join(part.source for part in examples),
        chain("items"),
        np.concatenate([part.lengths for part in examples]),
        np.concatenate([part.supervised for part in examples]),
        tuple(piece for part in examples for piece in part.parts),
        rows=sum(part.rows for part in examples),
        formats=tuple(name for part in examples for name in part.formats),
        truncated=chain("truncated"),
        unanswered=chain("unanswered"),
        cut_off=chain("cut_off"),
        bad=chain("bad"),
        rewritten=sum(part.rewritten for part in examples),
        stores=tuple(pair for part in examples for pair in part.stores),
        digest="+".join(part.digest for part in examples),
        compared=examples[0].compared,
    )


class Windows:
    """Which tokens of which documents are an example each, for a whole store at once.

    Attributes:
        document, first, stop: of each example its document and its tokens there.
        lengths, supervised: see `Examples`.
        truncated, unanswered, cut_off: documents.
        rows, rewritten: counts of rows.

    """

    def __init__(self, store: Store, chosen: np.ndarray, max_length: int) -> None:
        blocks = [
            _window(store, int(part[0]), int(part[-1]) + 1, part - part[0], max_length)
            for part in np.split(chosen, range(_BLOCK, len(chosen), _BLOCK))
            if len(part)
        ]

        def whole(name: str) -> np.ndarray:
            return np.concatenate([np.zeros(0, np.int32), *(block[name] for block in blocks)])

        self.document, self.first, self.stop = whole("document"), whole("first"), whole("stop")
        self.lengths, self.supervised = whole("lengths"), whole("supervised")
        self.truncated, self.unanswered, self.cut_off = (
            whole("truncated"),
            whole("unanswered"),
            whole("cut_off"),
        )
        marked = whole("marked")
        self.rewritten = len(np.unique(store.documents[["file", "line"]][marked]))
        self.rows = len(chosen) - len(marked) + self.rewritten


def _window(
    store: Store, begin: int, end: int, chosen: np.ndarray, max_length: int
) -> dict[str, np.ndarray]:
    """The part of `Windows` that is made of the chosen documents between `begin` and `end`, in
    arrays of int32.
    """
    records = store.documents[begin:end]
    tokens, spans_before = (
        int(store.documents[name][begin - 1]) if begin else 0 for name in ("tokens", "spans")
    )
    sizes = np.diff(records["tokens"], prepend=tokens)
    owner = np.repeat(np.arange(len(records)), np.diff(records["spans"], prepend=spans_before))
    spans = store.spans[spans_before : int(records["spans"][-1])]
    start, stop = np.maximum(spans["begin"], 1), spans["end"]  # nothing predicts a first token
    text = (records["marks"] & TEXT) > 0
    limit = np.where(text, sizes, np.minimum(sizes, max_length + 1))[owner]
    whole = _sums(owner, np.maximum(stop - start, 0), len(records))
    inside = np.maximum(np.minimum(stop, limit) - start, 0)
    within = _sums(owner, inside, len(records))
    last = np.zeros(len(records), np.int64)
    np.maximum.at(last, owner, np.where(inside > 0, np.minimum(stop, limit) - 1, 0))

    taken = chosen[within[chosen] > 0]
    pieces = np.where(text[taken], -(-(sizes[taken] - 1) // max_length), 1)
    document = np.repeat(taken, pieces)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_length
    ends = np.minimum(first + max_length + 1, sizes[document])
    found = {
        "document": begin + document,
        "first": first,
        "stop": ends,
        "lengths": np.where(text[document], ends - first - 1, last[document]),
        "supervised": np.where(text[document], ends - first - 1, within[document]),
        "truncated": begin + chosen[within[chosen] < whole[chosen]],
        "unanswered": begin + chosen[whole[chosen] == 0],
        "cut_off": begin + chosen[(whole[chosen] > 0) & (within[chosen] == 0)],
        "marked": begin + chosen[(records["marks"][chosen] & REWRITTEN) > 0],
    }
    store.let_go()
    return {name: values.astype(np.int32) for name, values in found.items()}


def _sums(owner: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(owner, weights=values, minlength=count).astype(np.int64)


class Lazy(Sequence):
    """A sequence whose elements are made when they are asked for, by `at`."""

    @abstractmethod
    def at(self, index: int) -> Any:
        """The element at an index from 0."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.at(number) for number in range(*index.indices(len(self)))]
        return self.at(range(len(self))[index])


@dataclass(frozen=True)
class TruncatedExamples(Lazy):
    """Examples read from a store when they are asked for."""

    store: Store
    document: np.ndarray
    first: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def at(self, index: int) -> Any:
        """See Lazy."""
        document, first, stop = (
            int(self.document[index]),
            int(self.first[index]),
            int(self.stop[index]),
        )
        records, spans = self.store.documents, self.store.spans
        start = int(records["tokens"][document - 1]) if document else 0
        weights = np.zeros(stop - first, np.float32)
        for span in spans[
            int(records["spans"][document - 1]) if document else 0 : int(records["spans"][document])
        ]:
            begin, end = max(int(span["begin"]) - first, 0), int(span["end"]) - first
            if end > 0:
                weights[begin:end] = span["weight"]
        self.store.let_go()
        return Example(self.store.read(start + first, start + stop), weights)


@dataclass(frozen=True)
class Places(Lazy):
    """Places of documents, as text."""

    store: Store
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def at(self, index: int) -> Any:
        """See Lazy."""
        return str(self.store.place(int(self.documents[index])))


@dataclass(frozen=True)
class _Chain(Lazy):
    """Sequences one after the other."""

    parts: list[Sequence]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, index: int) -> Any:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - (int(self._ends[part - 1]) if part else 0)]
