"""Which examples share a row and which rows share a batch: a plan of the epoch, known before it
begins.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.core.errors import RunError
from jaxtune.data.batch import Batch
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.examples import SourceShare, fed_length
from jaxtune.data.formats.preference import Compared

LOOK_AHEAD, OPEN_ROWS = 2048, 128
_BUCKETS = (
    32,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    6144,
    8192,
    12288,
    16384,
    24576,
    32768,
)
_SORTED_TOGETHER = 64

PackedRow = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How examples are laid into batches.

    Attributes:
        rows: rows per batch.
        max_length: longest row.
        packing: whether examples share rows.
        shuffle: whether the order is drawn by seed and epoch.
        seed: seed of the order.

    """

    rows: int
    max_length: int
    packing: bool
    shuffle: bool
    seed: int


@dataclass(frozen=True)
class Epoch:
    """The rows of one pass over the data, in order.

    Attributes:
        members: the examples of all rows, row after row.
        ends: where each row's examples end in `members`.
        rows: rows per batch.

    """

    members: np.ndarray
    ends: np.ndarray
    rows: int

    def __len__(self) -> int:
        return -(-len(self.ends) // self.rows)

    def batch(self, index: int) -> list[PackedRow]:
        """The rows of a batch; of the last one there may be fewer."""
        chosen = range(index * self.rows, min((index + 1) * self.rows, len(self.ends)))
        return [
            tuple(self.members[self.ends[row - 1] if row else 0 : self.ends[row]].tolist())
            for row in chosen
        ]


def plan_epoch(
    lengths: np.ndarray, layout: Layout, epoch: int, parts: Sequence[SourceShare] = ()
) -> Epoch:
    """Every example once (of a source of weight w, w times), in batches of rows.

    Args:
        lengths: positions that each example takes.
        layout: see `Layout`.
        epoch: number of the epoch from 0.
        parts: the sources that the examples come from; all of weight 1 where it is empty.

    """
    random = np.random.Generator(np.random.PCG64([layout.seed, epoch]))
    order = _drawn(len(lengths), parts, layout.seed, epoch)
    if layout.shuffle:
        order = random.permutation(order)
    if layout.packing:
        return _rows(order, _best_fit(order, lengths, layout.max_length), layout, random)
    if layout.shuffle:
        order = _by_length(order, lengths, layout.rows, random)
    return Epoch(order, np.arange(1, len(order) + 1), layout.rows)


def _drawn(count: int, parts: Sequence[SourceShare], seed: int, epoch: int) -> np.ndarray:
    """The examples that an epoch shows, before they are put in order.

    A source of weight w is gone through again and again, each time in another order, and an epoch
    takes the next w of a pass: so after 1/w epochs each of its examples was seen, and none twice.
    """
    if all(part.weight == 1 for part in parts):
        return np.arange(count)
    found, start = [], 0
    for number, part in enumerate(parts):
        begin, end = (math.ceil(part.weight * part.count * at) for at in (epoch, epoch + 1))
        while begin < end:
            turn, offset = divmod(begin, part.count)
            order = np.random.Generator(np.random.PCG64([seed, number, turn, 1])).permutation(
                part.count
            )
            taken = order[offset : offset + end - begin]
            found.append(start + taken)
            begin += len(taken)
        start += part.count
    return np.concatenate([np.zeros(0, np.int64), *found])


def _best_fit(order: np.ndarray, lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The number of the row that each place of `order` goes to, by best-fit decreasing with a
    bounded look-ahead.

    Of each `LOOK_AHEAD` examples the longest goes first, each to the open row that it fills best;
    then all but the `OPEN_ROWS` emptiest rows are closed.
    """
    rows = np.zeros(len(order), np.int32)
    free: list[tuple[int, int]] = []  # (space left, number of the row), sorted
    count = 0
    for start in range(0, len(order), LOOK_AHEAD):
        ahead = start + np.argsort(-lengths[order[start : start + LOOK_AHEAD]], kind="stable")
        chosen = []
        for need in lengths[order[ahead]].tolist():
            at = bisect.bisect_left(free, (need, -1))
            if at < len(free):
                space, row = free.pop(at)
            else:
                space, row, count = capacity, count, count + 1
            bisect.insort(free, (space - need, row))
            chosen.append(row)
        rows[ahead] = chosen
        del free[: max(len(free) - OPEN_ROWS, 0)]
    return rows


def _rows(
    order: np.ndarray, row_of: np.ndarray, layout: Layout, random: np.random.Generator
) -> Epoch:
    """The packed rows, shuffled or else in the order of their first examples."""
    _, first, row_of, sizes = np.unique(
        row_of, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(sizes), np.int64)
    rank[random.permutation(len(sizes)) if layout.shuffle else np.argsort(first)] = np.arange(
        len(sizes)
    )
    members = order[np.argsort(rank[row_of], kind="stable")]
    return Epoch(members, np.cumsum(sizes[np.argsort(rank)]), layout.rows)


def _by_length(
    order: np.ndarray, lengths: np.ndarray, rows: int, random: np.random.Generator
) -> np.ndarray:
    """Examples of like length share a batch: within stretches of so many batches they are
    sorted, and then the batches are shuffled.
    """
    stretch = rows * _SORTED_TOGETHER
    order = np.concatenate(
        [
            part[np.argsort(lengths[part], kind="stable")]
            for part in np.split(order, range(stretch, len(order), stretch))
        ]
    )
    whole = len(order) // rows * rows
    return np.concatenate(
        [random.permutation(order[:whole].reshape(-1, rows), axis=0).reshape(-1), order[whole:]]
    )


def row_length(rows: Sequence[PackedRow], lengths: np.ndarray, layout: Layout) -> int:
    """Tokens per row of a batch: the maximum where rows are packed, else the next of a few
    sizes, so that shapes stay few.
    """
    if layout.packing:
        return layout.max_length
    longest = max(int(lengths[index]) for row in rows for index in row)
    return min(
        layout.max_length, next((size for size in _BUCKETS if size >= longest), layout.max_length)
    )


def build_batch(
    rows: Sequence[PackedRow],
    examples: Sequence[Example | Compared],
    lengths: np.ndarray,
    shape: tuple[int, int],
    wanted: np.ndarray | None = None,
    segments: int = 0,
) -> Batch:
    """The arrays of a batch; rows that are not there are padding.

    Args:
        rows: the examples of each row.
        examples: all examples.
        lengths: positions that each takes.
        shape: rows and positions of the batch.
        wanted: which rows to fill, where another process fills the others; all by default.
        segments: where answers are compared, how many a row may hold.

    Raises:
        RunError: no token of the batch is supervised.

    """
    if not any(rows):
        raise RunError("A batch has no supervised token, so its loss is not defined.")
    labels = np.zeros((shape[0], segments), np.int32)
    batch = Batch(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        labels if segments else None,
    )
    for number, row in enumerate(rows):
        if wanted is not None and not wanted[number]:
            continue
        at = segment = 0
        for index in row:
            item = examples[index]
            if isinstance(item, Compared):
                labels[number, segment : segment + 2] = item.labels
                parts = [(part, fed_length(part)) for part in item.parts]
            else:
                parts = [(item, int(lengths[index]))]
            for example, size in parts:
                segment += 1
                _lay(batch, (number, slice(at, at + size)), example, size, segment)
                at += size
    if wanted is None and not batch.weights.any():
        raise RunError("A batch has no supervised token, so its loss is not defined.")
    return batch


def _lay(batch: Batch, place: tuple[int, slice], example: Example, size: int, segment: int) -> None:
    """Put the fed part of an example in its place."""
    batch.input_ids[place] = example.ids[:size]
    batch.target_ids[place] = example.ids[1 : size + 1]
    batch.weights[place] = example.weights[1 : size + 1]
    batch.segment_ids[place] = segment
    batch.positions[place] = np.arange(size)
