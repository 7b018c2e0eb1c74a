"""Which examples share a row and which rows share a batch: a plan of the epoch, known before it begins."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.core.errors import RunFailure
from jaxtune.data.chat import Example
from jaxtune.data.examples import fed_length
from jaxtune.objectives.sft import Batch

OPEN_ROWS = 128
_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)

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


def epoch_batches(lengths: np.ndarray, layout: Layout, epoch: int) -> list[list[PackedRow]]:
    """Every example exactly once, in batches of rows; the last batch may have fewer rows.

    Args:
        lengths: positions that each example takes.
        layout: see `Layout`.
        epoch: number of the epoch from 0.

    """
    order = np.arange(len(lengths))
    if layout.shuffle:
        order = np.random.Generator(np.random.PCG64([layout.seed, epoch])).permutation(len(lengths))
    rows = _best_fit(order, lengths, layout.max_length) if layout.packing else [(int(index),) for index in order]
    return [rows[start : start + layout.rows] for start in range(0, len(rows), layout.rows)]


def _best_fit(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[PackedRow]:
    """Each example goes to the open row that it fills best; beyond `OPEN_ROWS` the fullest row is closed."""
    done: list[PackedRow] = []
    free: list[tuple[int, int]] = []  # (space left, number of the row), sorted
    open_rows: dict[int, list[int]] = {}
    for number, index in enumerate(map(int, order)):
        need = int(lengths[index])
        at = bisect.bisect_left(free, (need, -1))
        space, row = free.pop(at) if at < len(free) else (capacity, number)
        open_rows.setdefault(row, []).append(index)
        bisect.insort(free, (space - need, row))
        if len(free) > OPEN_ROWS:
            done.append(tuple(open_rows.pop(free.pop(0)[1])))
    return done + [tuple(members) for members in open_rows.values()]


def row_length(rows: Sequence[PackedRow], lengths: np.ndarray, layout: Layout) -> int:
    """Tokens per row of a batch: the maximum where rows are packed, else the next of a few sizes, so that shapes stay few."""
    if layout.packing:
        return layout.max_length
    longest = max(int(lengths[index]) for row in rows for index in row)
    return min(layout.max_length, next((size for size in _BUCKETS if size >= longest), layout.max_length))


def build_batch(rows: Sequence[PackedRow], examples: Sequence[Example], count: int, length: int) -> Batch:
    """The arrays of a batch, [count, length]; rows that are not there are padding.

    Raises:
        RunFailure: no token of the batch is supervised.

    """
    shape = (count, length)
    batch = Batch(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
    )
    for number, row in enumerate(rows):
        at = 0
        for segment, index in enumerate(row, 1):
            example = examples[index]
            size = fed_length(example)
            place = (number, slice(at, at + size))
            batch.input_ids[place] = example.ids[:size]
            batch.target_ids[place] = example.ids[1 : size + 1]
            batch.weights[place] = example.supervised[1 : size + 1]
            batch.segment_ids[place] = segment
            batch.positions[place] = np.arange(size)
            at += size
    if not batch.weights.any():
        raise RunFailure("A batch has no supervised token, so its loss is not defined.")
    return batch
