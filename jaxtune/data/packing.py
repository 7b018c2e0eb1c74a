"""Which examples share a row and which rows share a batch: the schedule of an epoch, known before
it begins.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.core.errors import RunError
from jaxtune.data.batch import Batch
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.comparisons import AnswerPair
from jaxtune.data.examples import SourceShare, fed_length

_LOOK_AHEAD, _OPEN_ROWS = 2048, 128
_BUCKETS = (
    32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288,
    16384, 24576, 32768,
)  # fmt: skip
_SORTED_TOGETHER = 64

PackedRow = tuple[int, ...]
"""The examples that share a row."""


@dataclass(frozen=True)
class Layout:
    """How examples are laid into batches.

    Attributes:
        rows: rows per batch.
        max_length: longest row.
        packing: whether examples share rows.
        shuffle: whether the order is drawn from seed and epoch.
        seed: seed of the order.

    """

    rows: int
    max_length: int
    packing: bool
    shuffle: bool
    seed: int


@dataclass(frozen=True)
class EpochSchedule:
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
        """Return the rows of a batch; the last one may have fewer."""
        numbers = range(index * self.rows, min((index + 1) * self.rows, len(self.ends)))
        return [
            tuple(self.members[self.ends[row - 1] if row else 0 : self.ends[row]].tolist())
            for row in numbers
        ]


def schedule_epoch(
    lengths: np.ndarray, layout: Layout, epoch: int, shares: Sequence[SourceShare] = ()
) -> EpochSchedule:
    """Schedule every example once (those of a source of weight w, w times), in batches of rows.

    Args:
        lengths: positions that each example takes.
        layout: see `Layout`.
        epoch: number of the epoch from 0.
        shares: the sources that the examples come from; all of weight 1 where it is empty.

    """
    random = np.random.Generator(np.random.PCG64([layout.seed, epoch]))
    order = _draw(len(lengths), shares, layout.seed, epoch)
    if layout.shuffle:
        order = random.permutation(order)
    if layout.packing:
        return _pack(order, _best_fit(order, lengths, layout.max_length), layout, random)
    if layout.shuffle:
        order = _sort_by_length(order, lengths, layout.rows, random)
    return EpochSchedule(order, np.arange(1, len(order) + 1), layout.rows)


def _draw(count: int, shares: Sequence[SourceShare], seed: int, epoch: int) -> np.ndarray:
    """Return the examples that an epoch shows, before they are put in order.

    A source of weight w is gone through again and again, each time in another order, and an epoch
    takes the next w of a pass: so after 1/w epochs each of its examples was seen, and none twice.
    """
    if all(share.weight == 1 for share in shares):
        return np.arange(count)
    drawn, start = [], 0
    for number, share in enumerate(shares):
        begin, end = (math.ceil(share.weight * share.count * at) for at in (epoch, epoch + 1))
        while begin < end:
            turn, offset = divmod(begin, share.count)
            random = np.random.Generator(np.random.PCG64([seed, number, turn, 1]))
            next_ones = random.permutation(share.count)[offset : offset + end - begin]
            drawn.append(start + next_ones)
            begin += len(next_ones)
        start += share.count
    return np.concatenate([np.zeros(0, np.int64), *drawn])


def _best_fit(order: np.ndarray, lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the number of the row that each example of `order` goes to, by best-fit decreasing
    with a bounded look-ahead.

    Of each `_LOOK_AHEAD` examples the longest goes first, each to the open row that it fills best;
    then all but the `_OPEN_ROWS` emptiest rows are closed.
    """
    rows = np.zeros(len(order), np.int32)
    free: list[tuple[int, int]] = []  # (space left, number of the row), sorted
    count = 0
    for start in range(0, len(order), _LOOK_AHEAD):
        ahead = start + np.argsort(-lengths[order[start : start + _LOOK_AHEAD]], kind="stable")
        assigned = []
        for need in lengths[order[ahead]].tolist():
            at = bisect.bisect_left(free, (need, -1))
            if at < len(free):
                space, row = free.pop(at)
            else:
                space, row, count = capacity, count, count + 1
            bisect.insort(free, (space - need, row))
            assigned.append(row)
        rows[ahead] = assigned
        del free[: max(len(free) - _OPEN_ROWS, 0)]
    return rows


def _pack(
    order: np.ndarray, row_of: np.ndarray, layout: Layout, random: np.random.Generator
) -> EpochSchedule:
    """Return the packed rows, shuffled or else in the order of their first examples."""
    _, first, row_of, sizes = np.unique(
        row_of, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(sizes), np.int64)
    rank[random.permutation(len(sizes)) if layout.shuffle else np.argsort(first)] = np.arange(
        len(sizes)
    )
    members = order[np.argsort(rank[row_of], kind="stable")]
    return EpochSchedule(members, np.cumsum(sizes[np.argsort(rank)]), layout.rows)


def _sort_by_length(
    order: np.ndarray, lengths: np.ndarray, rows: int, random: np.random.Generator
) -> np.ndarray:
    """Reorder examples so that those of similar length share a batch: they are sorted within
    stretches of `_SORTED_TOGETHER` batches, and then the batches are shuffled.
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
    """Return the tokens per row of a batch: the maximum where rows are packed, else the next of a
    few sizes, so that there are few shapes.
    """
    if layout.packing:
        return layout.max_length
    longest = max(int(lengths[index]) for row in rows for index in row)
    return min(
        layout.max_length, next((size for size in _BUCKETS if size >= longest), layout.max_length)
    )


def build_batch(
    rows: Sequence[PackedRow],
    examples: Sequence[Example | AnswerPair],
    lengths: np.ndarray,
    shape: tuple[int, int],
    row_mask: np.ndarray | None = None,
    segments: int = 0,
) -> Batch:
    """Build the arrays of a batch; missing rows are padding.

    Args:
        rows: the examples of each row.
        examples: all examples.
        lengths: positions that each takes.
        shape: rows and positions of the batch.
        row_mask: which rows to fill, where another process fills the others; all by default.
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
        if row_mask is not None and not row_mask[number]:
            continue
        at = segment = 0
        for index in row:
            item = examples[index]
            if isinstance(item, AnswerPair):
                labels[number, segment : segment + 2] = item.labels
                parts = [(answer, fed_length(answer)) for answer in item.answers]
            else:
                parts = [(item, int(lengths[index]))]
            for example, size in parts:
                segment += 1
                _place(batch, (number, slice(at, at + size)), example, segment)
                at += size
    if row_mask is None and not batch.weights.any():
        raise RunError("A batch has no supervised token, so its loss is not defined.")
    return batch


def _place(batch: Batch, where: tuple[int, slice], example: Example, segment: int) -> None:
    """Write the fed part of an example into its place: a row, and positions there."""
    size = where[1].stop - where[1].start
    batch.input_ids[where] = example.ids[:size]
    batch.target_ids[where] = example.ids[1 : size + 1]
    batch.weights[where] = example.weights[1 : size + 1]
    batch.segment_ids[where] = segment
    batch.positions[where] = np.arange(size)
