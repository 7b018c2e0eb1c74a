"""The examples of a source: tokenized rows truncated to a length, with an account of what was
truncated or left out.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.chat.answers import end_of_answer
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.store import BAD, GOOD, REWRITTEN, TEXT, Store, special_ids

_BLOCK = 1 << 17  # documents looked at together, so that intermediate arrays stay small


@dataclass(frozen=True)
class SourceShare:
    """Consecutive examples of one source, and how often an epoch shows them."""

    count: int
    weight: float


@dataclass(frozen=True)
class Examples:
    """Examples ready for training: truncated, each with at least one supervised token.

    Attributes:
        source: what the user named.
        items: the examples in the order of their rows.
        lengths: positions that each takes in a row: up to the one that predicts its last supervised
            token.
        supervised: supervised tokens of each.
        shares: how many of them come from each source, and the sources' weights.
        rows: rows read.
        formats: the format of each source.
        truncated: locations of rows that lost supervised tokens to the truncation.
        unanswered: locations of rows that have nothing supervised at all.
        cut_off: locations of rows whose answers lie wholly beyond the truncation.
        bad: what is wrong with rows that were left out, each with its location.
        rewritten: rows split into one example an answer, because the template rewrites earlier
            turns.
        stores: the tokenized sources, each with the indices of the documents that are used.
        digest: changes when the tokens change.
        paired: whether the items are answers side by side (`comparisons.AnswerPair`).

    """

    source: str
    items: Sequence[Any]
    lengths: np.ndarray
    supervised: np.ndarray
    shares: tuple[SourceShare, ...]
    rows: int = 0
    formats: tuple[str, ...] = ()
    truncated: Sequence[str] = ()
    unanswered: Sequence[str] = ()
    cut_off: Sequence[str] = ()
    bad: Sequence[str] = ()
    rewritten: int = 0
    stores: tuple[tuple[Store, np.ndarray], ...] = field(default=(), repr=False)
    digest: str = ""
    paired: bool = False

    @property
    def largest_token(self) -> int:
        """Return the largest token id; -1 where there is none."""
        return max((store.manifest["largest_token"] for store, _ in self.stores), default=-1)

    @property
    def kinds(self) -> set[str]:
        """Return what the rows are: `chat`, `plain` (a prompt and its completion) or `text`."""
        return {kind for store, _ in self.stores for kind in store.manifest["kinds"]}

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens at which answers end, for generation: what the chat template, or EOS,
        puts behind them, and what ended the supervised ones here.
        """
        end, special = end_of_answer(tokenizer), special_ids(tokenizer)
        ends = {token for store, _ in self.stores for token in store.answer_ends(special)}
        return sorted(ends | ({end} if end is not None else set()))

    def labels_digest(self) -> str:
        """Return a digest of which answers are good and which bad; `digest` is of tokens alone."""
        digest = hashlib.blake2b(digest_size=16)
        for store, documents in self.stores:
            marks = store.documents["marks"][documents] & (GOOD | BAD)
            digest.update(np.ascontiguousarray(marks).tobytes())
            store.release()
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return counts for the terminal, `data.json` and the report."""
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
    """Return how many tokens of an example are fed: what follows its last supervised token can
    change no loss and is not fed.
    """
    return int(np.flatnonzero(example.weights)[-1])


def in_memory(items: Sequence[Example], source: str = "memory") -> Examples:
    """Return examples that come from no store."""
    lengths = np.array([fed_length(item) for item in items], np.int64)
    supervised = np.array([np.count_nonzero(item.weights[1:]) for item in items], np.int64)
    return Examples(
        source, items, lengths, supervised, (SourceShare(len(items), 1.0),), rows=len(items)
    )


def build_examples(
    store: Store, documents: np.ndarray, max_length: int, name: str, weight: float = 1.0
) -> Examples:
    """Build the examples of a store.

    A conversation is truncated at its end. A text continues in the next example, which begins with
    the token the last one ended on, so that each of its tokens is predicted once.

    Args:
        store: tokenized rows.
        documents: indices of the documents to use.
        max_length: most tokens of an example that are fed and, from the second on, predicted.
        name: what the user named.
        weight: passes over them in an epoch.

    """
    windows = Windows(store, documents, max_length)
    return Examples(
        name,
        TruncatedExamples(store, windows.document, windows.first, windows.stop),
        windows.lengths,
        windows.supervised,
        (SourceShare(len(windows.lengths), weight),),
        rows=windows.rows,
        formats=(store.manifest["format"],),
        truncated=RowLocations(store, windows.truncated),
        unanswered=RowLocations(store, windows.unanswered),
        cut_off=RowLocations(store, windows.cut_off),
        bad=store.manifest["bad"],
        rewritten=windows.rewritten,
        stores=((store, documents),),
        digest=f"{store.manifest['digest']}:{len(documents)}:{int(documents.sum())}",
    )


def join_examples(examples: Sequence[Examples]) -> Examples:
    """Join the examples of several sources, one source after the other."""
    if len(examples) == 1:
        return examples[0]

    def chain(name: str) -> Any:
        return _Chain([getattr(part, name) for part in examples])

    return Examples(
        ", ".join(part.source for part in examples),
        chain("items"),
        np.concatenate([part.lengths for part in examples]),
        np.concatenate([part.supervised for part in examples]),
        tuple(share for part in examples for share in part.shares),
        rows=sum(part.rows for part in examples),
        formats=tuple(name for part in examples for name in part.formats),
        truncated=chain("truncated"),
        unanswered=chain("unanswered"),
        cut_off=chain("cut_off"),
        bad=chain("bad"),
        rewritten=sum(part.rewritten for part in examples),
        stores=tuple(pair for part in examples for pair in part.stores),
        digest="+".join(part.digest for part in examples),
        paired=examples[0].paired,
    )


class Windows:
    """Which tokens of which documents are an example each, for a whole store at once.

    Args:
        store: tokenized rows.
        documents: indices of the documents to use.
        max_length: see `build_examples`.

    Attributes:
        document, first, stop: of each example its document and its tokens there.
        lengths, supervised: see `Examples`.
        truncated, unanswered, cut_off: documents.
        rows, rewritten: counts of rows.

    """

    def __init__(self, store: Store, documents: np.ndarray, max_length: int) -> None:
        blocks = [
            _windows_of(store, int(block[0]), int(block[-1]) + 1, block - block[0], max_length)
            for block in np.split(documents, range(_BLOCK, len(documents), _BLOCK))
            if len(block)
        ]

        def whole(name: str) -> np.ndarray:
            return np.concatenate([np.zeros(0, np.int32), *(block[name] for block in blocks)])

        self.document, self.first, self.stop = whole("document"), whole("first"), whole("stop")
        self.lengths, self.supervised = whole("lengths"), whole("supervised")
        self.truncated = whole("truncated")
        self.unanswered, self.cut_off = whole("unanswered"), whole("cut_off")
        rewritten = whole("rewritten")
        self.rewritten = len(np.unique(store.documents[["file", "line"]][rewritten]))
        self.rows = len(documents) - len(rewritten) + self.rewritten


def _windows_of(
    store: Store, begin: int, end: int, selected: np.ndarray, max_length: int
) -> dict[str, np.ndarray]:
    """Return the part of `Windows` that comes from the selected documents between `begin` and
    `end`, in arrays of int32; `selected` counts from `begin`.
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
    whole = _sum_by(owner, np.maximum(stop - start, 0), len(records))
    inside = np.maximum(np.minimum(stop, limit) - start, 0)
    within = _sum_by(owner, inside, len(records))
    last = np.zeros(len(records), np.int64)
    np.maximum.at(last, owner, np.where(inside > 0, np.minimum(stop, limit) - 1, 0))

    trained = selected[within[selected] > 0]
    counts = np.where(text[trained], -(-(sizes[trained] - 1) // max_length), 1)
    document = np.repeat(trained, counts)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_length
    ends = np.minimum(first + max_length + 1, sizes[document])
    windows = {
        "document": begin + document,
        "first": first,
        "stop": ends,
        "lengths": np.where(text[document], ends - first - 1, last[document]),
        "supervised": np.where(text[document], ends - first - 1, within[document]),
        "truncated": begin + selected[within[selected] < whole[selected]],
        "unanswered": begin + selected[whole[selected] == 0],
        "cut_off": begin + selected[(whole[selected] > 0) & (within[selected] == 0)],
        "rewritten": begin + selected[(records["marks"][selected] & REWRITTEN) > 0],
    }
    store.release()
    return {name: values.astype(np.int32) for name, values in windows.items()}


def _sum_by(owner: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(owner, weights=values, minlength=count).astype(np.int64)


class LazySequence(Sequence):
    """A sequence whose elements are computed by `at` when they are asked for."""

    @abstractmethod
    def at(self, index: int) -> Any:
        """Return the element at an index from 0."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.at(number) for number in range(*index.indices(len(self)))]
        return self.at(range(len(self))[index])


@dataclass(frozen=True)
class TruncatedExamples(LazySequence):
    """Examples read from a store when they are asked for.

    Attributes:
        store: tokenized rows.
        document, first, stop: see `Windows`.

    """

    store: Store
    document: np.ndarray
    first: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def at(self, index: int) -> Any:
        """Return an `Example`; see `LazySequence`."""
        document = int(self.document[index])
        first, stop = int(self.first[index]), int(self.stop[index])
        records, spans = self.store.documents, self.store.spans
        start = int(records["tokens"][document - 1]) if document else 0
        spans_before = int(records["spans"][document - 1]) if document else 0
        weights = np.zeros(stop - first, np.float32)
        for span in spans[spans_before : int(records["spans"][document])]:
            begin, end = max(int(span["begin"]) - first, 0), int(span["end"]) - first
            if end > 0:
                weights[begin:end] = span["weight"]
        self.store.release()
        return Example(self.store.read(start + first, start + stop), weights)


@dataclass(frozen=True)
class RowLocations(LazySequence):
    """Locations of documents, as text."""

    store: Store
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def at(self, index: int) -> Any:
        """Return a location; see `LazySequence`."""
        return str(self.store.location(int(self.documents[index])))


@dataclass(frozen=True)
class _Chain(LazySequence):
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
