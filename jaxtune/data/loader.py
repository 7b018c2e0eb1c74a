"""The batches of a run: batch i is known without the ones before it, so a run resumes anywhere at
no cost.

Which examples are in batch i depends on the data, the layout and the seed alone. Each process
builds the rows of its own devices, so the sequence of batches is the same for every mesh and every
number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
from jaxtune.data.packing import Epoch, Layout, PackedRow, build_batch, plan_epoch, row_length

_EPOCHS_KEPT = 2
BATCH_AXES = (None, "batch", "seq")
"""Logical axes of a batch's arrays: micro_batches, rows, tokens."""


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the devices.

    Attributes:
        index: its number in the run.
        tokens: tokens of examples in it, over all processes.
        padding: the positions beside these.
        batch: [micro_batches, rows, tokens], rows sharded over the mesh.

    """

    index: int
    tokens: int
    padding: int
    batch: Batch


class BatchSchedule:
    """The whole sequence of batches of a run.

    Args:
        examples: what is trained on.
        layout: how it is laid into batches.
        epochs: passes over the data.
        steps: number of batches; overrides `epochs`.

    """

    def __init__(
        self, examples: Examples, layout: Layout, epochs: int, steps: int | None = None
    ) -> None:
        self.examples, self.layout = examples, layout
        self._epochs, self._steps = epochs, steps
        self._planning = RLock()  # the thread that prefetches asks too
        self._starts = [0]  # number of the first batch of each epoch that was planned so far
        self.epoch_plan = lru_cache(_EPOCHS_KEPT)(self._plan_epoch)

    def _plan_epoch(self, epoch: int) -> Epoch:
        """The rows of an epoch."""
        return plan_epoch(self.examples.lengths, self.layout, epoch, self.examples.parts)

    def _start(self, epoch: int) -> int:
        with self._planning:
            while len(self._starts) <= epoch:
                found = len(self.epoch_plan(len(self._starts) - 1))
                self._starts.append(self._starts[-1] + found)
            return self._starts[epoch]

    def __len__(self) -> int:
        return self._start(self._epochs) if self._steps is None else self._steps

    def _locate(self, index: int) -> tuple[int, int]:
        """`(epoch, number of the batch in it)`."""
        epoch = 0
        while self._start(epoch + 1) <= index:
            epoch += 1
        return epoch, index - self._start(epoch)

    def rows(self, index: int) -> list[PackedRow]:
        """The examples in each row of batch `index`."""
        epoch, number = self._locate(index)
        return self.epoch_plan(epoch).batch(number)

    def epoch(self, index: int) -> float:
        """Epochs done after batch `index`, as a fraction."""
        epoch, number = self._locate(index)
        return epoch + (number + 1) / len(self.epoch_plan(epoch))

    def shape(self, index: int) -> tuple[int, int]:
        """Rows and positions of batch `index`."""
        return self.layout.rows, row_length(self.rows(index), self.examples.lengths, self.layout)

    def batch(self, index: int, wanted: np.ndarray | None = None) -> Batch:
        """The arrays of batch `index`, [rows, length]; only the rows that are wanted are filled."""
        shape, lengths = self.shape(index), self.examples.lengths
        segments = (
            2 * (shape[1] // int(lengths.min()) if self.layout.packing else 1)
            if self.examples.compared
            else 0
        )
        return build_batch(self.rows(index), self.examples.items, lengths, shape, wanted, segments)

    def tokens(self, index: int) -> int:
        """Tokens of examples in batch `index`."""
        return int(sum(self.examples.lengths[list(row)].sum() for row in self.rows(index)))

    def efficiency(self) -> float:
        """Share of the positions of the first epoch that hold a token."""
        epoch = self.epoch_plan(0)
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
    plan: BatchSchedule, start: int, micro_batches: int, mesh: Mesh, ahead: int = 2
) -> Iterator[DeviceBatch]:
    """The batches from `start` to the end, cut for accumulation, prefetched.

    Args:
        plan: the sequence.
        start: index of the first batch.
        micro_batches: micro-batches per batch.
        mesh: the mesh over which rows are sharded.
        ahead: batches that are prepared in advance.

    """
    import grain

    wanted = local_rows(plan.layout.rows, micro_batches, mesh)

    def load(index: Any) -> tuple[int, Batch]:
        return int(index), plan.batch(int(index), wanted)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    for index, batch in grain.MapDataset.range(start, len(plan)).map(load).to_iter_dataset(options):
        tokens = plan.tokens(index)
        yield DeviceBatch(
            index, tokens, batch.input_ids.size - tokens, on_devices(batch, micro_batches, mesh)
        )


def on_devices(batch: Batch, micro_batches: int, mesh: Mesh) -> Batch:
    """The batch as device arrays [micro_batches, rows, tokens], sharded over the mesh; a process
    gives what its own devices hold.
    """

    def put(part: np.ndarray) -> jax.Array:
        cut = part.reshape(micro_batches, part.shape[0] // micro_batches, *part.shape[1:])
        return jax.make_array_from_callback(
            cut.shape, sharding(mesh, BATCH_AXES, cut.shape), lambda index: cut[index]
        )

    return jax.tree.map(put, batch)


def batch_shapes(
    shape: tuple[int, int], micro_batches: int, mesh: Mesh, segments: int = 0
) -> Batch:
    """What `on_devices` gives for a batch of this many rows and tokens a row, as shapes.

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
    """Which rows of a batch lie on devices of this process, bool [rows]."""
    found = np.zeros((micro_batches, rows // micro_batches), bool)
    place = sharding(mesh, BATCH_AXES[:2], found.shape)
    for index in place.addressable_devices_indices_map(found.shape).values():
        found[index or ...] = True
    return found.reshape(-1)


def check_divides(config: Config, mesh: Mesh) -> None:
    """Rows that are computed together must divide over the devices that share a batch, and a row's
    tokens over the context axis.

    Raises:
        UserError: they do not; with the nearest number that does.

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
