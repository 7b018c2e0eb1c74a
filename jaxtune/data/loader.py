"""The batches of a run: batch i is known without the ones before it, so a run resumes anywhere at
no cost.

Which examples are in batch i depends on the data, the layout and the seed alone. Each process
builds the rows of its own devices, so the sequence of batches is the same for every mesh and every
number of processes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from threading import RLock
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.core.sharding import axis_size, sharding
from jaxtune.data.batch import Batch
from jaxtune.data.examples import Examples
from jaxtune.data.packing import (
    EpochSchedule,
    Layout,
    PackedRow,
    build_batch,
    row_length,
    schedule_epoch,
)

_EPOCHS_KEPT = 2
BATCH_AXES = (None, "batch", "seq")
"""Logical axes of a batch's arrays: micro-batches, rows, tokens."""


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the devices.

    Attributes:
        index: its number in the run.
        tokens: tokens of examples in it, over all processes.
        padding: positions that hold no token.
        batch: [micro_batches, rows, tokens], rows sharded over the mesh.
        metrics: metrics for the log beside those of the step, such as its rewards.

    """

    index: int
    tokens: int
    padding: int
    batch: Batch
    metrics: Mapping[str, float] = field(default_factory=dict)


class BatchSchedule:
    """The whole sequence of batches of a run.

    Args:
        examples: what is trained on.
        layout: how the examples share rows and batches.
        epochs: passes over the data.
        steps: number of batches; overrides `epochs`.

    """

    def __init__(
        self, examples: Examples, layout: Layout, epochs: int, steps: int | None = None
    ) -> None:
        self.examples, self.layout = examples, layout
        self._epochs, self._steps = epochs, steps
        self._lock = RLock()  # the thread that prefetches asks too
        self._starts = [0]  # number of the first batch of each epoch scheduled so far
        self.epoch_schedule = lru_cache(_EPOCHS_KEPT)(self._schedule_epoch)

    def _schedule_epoch(self, epoch: int) -> EpochSchedule:
        return schedule_epoch(self.examples.lengths, self.layout, epoch, self.examples.shares)

    def _start(self, epoch: int) -> int:
        with self._lock:
            while len(self._starts) <= epoch:
                count = len(self.epoch_schedule(len(self._starts) - 1))
                self._starts.append(self._starts[-1] + count)
            return self._starts[epoch]

    def __len__(self) -> int:
        return self._start(self._epochs) if self._steps is None else self._steps

    def _locate(self, index: int) -> tuple[int, int]:
        """Return `(epoch, number of the batch in it)`."""
        epoch = 0
        while self._start(epoch + 1) <= index:
            epoch += 1
        return epoch, index - self._start(epoch)

    def rows(self, index: int) -> list[PackedRow]:
        """Return the examples in each row of batch `index`."""
        epoch, number = self._locate(index)
        return self.epoch_schedule(epoch).batch(number)

    def epoch(self, index: int) -> float:
        """Return the epochs done after batch `index`, as a fraction."""
        epoch, number = self._locate(index)
        return epoch + (number + 1) / len(self.epoch_schedule(epoch))

    def shape(self, index: int) -> tuple[int, int]:
        """Return rows and positions of batch `index`."""
        return self.layout.rows, row_length(self.rows(index), self.examples.lengths, self.layout)

    def batch(self, index: int, row_mask: np.ndarray | None = None) -> Batch:
        """Build the arrays of batch `index`, [rows, length].

        Args:
            index: number of the batch.
            row_mask: which rows to fill, bool [rows]; all by default.

        """
        shape, lengths = self.shape(index), self.examples.lengths
        segments = 0
        if self.examples.paired:
            segments = 2 * (shape[1] // int(lengths.min()) if self.layout.packing else 1)
        rows = self.rows(index)
        return build_batch(rows, self.examples.items, lengths, shape, row_mask, segments)

    def tokens(self, index: int) -> int:
        """Return the tokens of examples in batch `index`."""
        return int(sum(self.examples.lengths[list(row)].sum() for row in self.rows(index)))

    def efficiency(self) -> float:
        """Return the share of the positions of the first epoch that hold a token."""
        epoch = self.epoch_schedule(0)
        if self.layout.packing:
            return float(
                self.examples.lengths[epoch.members].sum()
                / (len(epoch.ends) * self.layout.max_length)
            )
        sizes = [
            len(rows) * row_length(rows, self.examples.lengths, self.layout)
            for rows in map(epoch.batch, range(len(epoch)))
        ]
        return float(self.examples.lengths[epoch.members].sum() / sum(sizes))


def batches(
    schedule: BatchSchedule, start: int, micro_batches: int, mesh: Mesh, ahead: int = 2
) -> Iterator[DeviceBatch]:
    """Yield the batches from `start` to the end, split into micro-batches, prefetched.

    Args:
        schedule: the sequence.
        start: index of the first batch.
        micro_batches: micro-batches per batch.
        mesh: the mesh over which rows are sharded.
        ahead: batches that are prepared in advance.

    """
    import grain

    row_mask = local_rows(schedule.layout.rows, micro_batches, mesh)

    def load(index: Any) -> tuple[int, Batch]:
        return int(index), schedule.batch(int(index), row_mask)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    numbers = grain.MapDataset.range(start, len(schedule))
    for index, batch in numbers.map(load).to_iter_dataset(options):
        tokens = schedule.tokens(index)
        yield DeviceBatch(
            index, tokens, batch.input_ids.size - tokens, on_devices(batch, micro_batches, mesh)
        )


def on_devices(batch: Batch, micro_batches: int, mesh: Mesh) -> Batch:
    """Return the batch as device arrays [micro_batches, rows, tokens], sharded over the mesh; a
    process gives what its own devices hold.
    """

    def put(part: np.ndarray) -> jax.Array:
        split = part.reshape(micro_batches, part.shape[0] // micro_batches, *part.shape[1:])
        return jax.make_array_from_callback(
            split.shape, sharding(mesh, BATCH_AXES, split.shape), lambda index: split[index]
        )

    return jax.tree.map(put, batch)


def batch_shapes(
    shape: tuple[int, int], micro_batches: int, mesh: Mesh, segments: int = 0
) -> Batch:
    """Return the shapes of what `on_devices` returns for a batch of this shape.

    Args:
        shape: rows, tokens.
        micro_batches: micro-batches.
        mesh: the devices.
        segments: where answers are compared, how many a row may hold.

    """

    def part(dtype: Any, size: int = shape[1]) -> Any:
        whole = (micro_batches, shape[0] // micro_batches, size)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=sharding(mesh, BATCH_AXES, whole))

    labels = part(np.int32, segments) if segments else None
    return Batch(
        part(np.int32), part(np.int32), part(np.float32), part(np.int32), part(np.int32), labels
    )


def local_rows(rows: int, micro_batches: int, mesh: Mesh) -> np.ndarray:
    """Return which rows of a batch lie on devices of this process, bool [rows]."""
    local = np.zeros((micro_batches, rows // micro_batches), bool)
    batch_sharding = sharding(mesh, BATCH_AXES[:2], local.shape)
    for index in batch_sharding.addressable_devices_indices_map(local.shape).values():
        local[index or ...] = True
    return local.reshape(-1)


def check_divides(config: Config, mesh: Mesh) -> None:
    """Check that the rows computed together divide over the devices that share a batch, and a row's
    tokens over the context axis.

    Raises:
        UserError: they do not; with the nearest numbers that do.

    """
    train, size = config.train, config.data.max_length
    key, rows = (
        ("micro_batch_size", train.micro_batch_size)
        if train.micro_batch_size
        else ("batch_size", train.batch_size)
    )
    for name, number, axis, over in (
        (f"train.{key}", rows, "batch", "mesh.slices x mesh.data x mesh.fsdp"),
        ("data.max_length", size, "seq", "mesh.context"),
    ):
        if number % (parts := axis_size(mesh, axis)):
            least = f", or {number // parts * parts}" if number > parts else ""
            raise UserError(
                f"{name} = {number} does not divide over {parts} devices ({over}). Use "
                f"{-(-number // parts) * parts}{least}."
            )
