"""The batches of a run: batch i is known without the ones before it, so a run resumes anywhere at no cost.

Which examples are in batch i depends on the data, the layout and the seed alone. Each process builds the rows of its own devices, so
the sequence of batches is the same for every mesh and every number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtune.core.axes import RULES
from jaxtune.core.errors import UserError
from jaxtune.data.examples import Examples
from jaxtune.data.packing import Epoch, Layout, PackedRow, build_batch, plan_epoch, row_length
from jaxtune.objectives.objective import Batch

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class Loaded:
    """A batch on the devices.

    Attributes:
        index: its number in the run.
        tokens: tokens of examples in it, over all processes.
        padding: the positions beside these.
        batch: [cuts, rows, tokens], rows sharded over the mesh.

    """

    index: int
    tokens: int
    padding: int
    batch: Batch


class Plan:
    """The whole sequence of batches of a run.

    Args:
        examples: what is trained on.
        layout: how it is laid into batches.
        epochs: passes over the data.
        steps: number of batches; overrides `epochs`.

    """

    def __init__(self, examples: Examples, layout: Layout, epochs: int, steps: int | None = None) -> None:
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
        segments = 2 * (shape[1] // int(lengths.min()) if self.layout.packing else 1) if self.examples.compared else 0
        return build_batch(self.rows(index), self.examples.items, lengths, shape, wanted, segments)

    def tokens(self, index: int) -> int:
        """Tokens of examples in batch `index`."""
        return int(sum(self.examples.lengths[list(row)].sum() for row in self.rows(index)))

    def efficiency(self) -> float:
        """Share of the positions of the first epoch that hold a token."""
        epoch = self.epoch_plan(0)
        if self.layout.packing:
            return float(self.examples.lengths[epoch.members].sum() / (len(epoch.ends) * self.layout.max_length))
        sizes = [len(rows) * row_length(rows, self.examples.lengths, self.layout) for rows in map(epoch.batch, range(len(epoch)))]
        return float(self.examples.lengths[epoch.members].sum() / sum(sizes))


def batches(plan: Plan, start: int, cuts: int, mesh: Mesh, ahead: int = 2) -> Iterator[Loaded]:
    """The batches from `start` to the end, cut for accumulation, prefetched.

    Args:
        plan: the sequence.
        start: index of the first batch.
        cuts: micro-batches per batch.
        mesh: the mesh over which rows are sharded.
        ahead: batches that are prepared in advance.

    """
    import grain

    wanted = local_rows(plan.layout.rows, cuts, mesh)

    def load(index: Any) -> tuple[int, Batch]:
        return int(index), plan.batch(int(index), wanted)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    for index, batch in grain.MapDataset.range(start, len(plan)).map(load).to_iter_dataset(options):
        tokens = plan.tokens(index)
        yield Loaded(index, tokens, batch.input_ids.size - tokens, on_devices(batch, cuts, mesh))


def on_devices(batch: Batch, cuts: int, mesh: Mesh) -> Batch:
    """The batch as device arrays [cuts, rows, tokens], rows sharded over the mesh; a process gives the rows of its own devices."""
    place = _sharding(mesh)

    def put(part: np.ndarray) -> jax.Array:
        cut = part.reshape(cuts, part.shape[0] // cuts, *part.shape[1:])
        return jax.make_array_from_callback(cut.shape, place, lambda index: cut[index])

    return jax.tree.map(put, batch)


def local_rows(rows: int, cuts: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch lie on devices of this process, bool [rows]."""
    found = np.zeros((cuts, rows // cuts), bool)
    for index in _sharding(mesh).addressable_devices_indices_map((cuts, rows // cuts, 1)).values():
        found[index[:2] if index else ...] = True
    return found.reshape(-1)


def check_divides(rows: int, mesh: Mesh, key: str) -> None:
    """Rows that are computed together must divide over the data axes.

    Raises:
        UserError: they do not; with the nearest number that does.

    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise UserError(
            f"{key} = {rows} rows do not divide over {ways} devices (mesh.data x mesh.fsdp). Use {-(-rows // ways) * ways}, or fewer of them."
        )


def _sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, RULES.spec((None, "batch", "seq")))
