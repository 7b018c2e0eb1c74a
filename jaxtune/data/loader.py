"""The batches of a run: batch i is known without the ones before it, so a run resumes anywhere at no cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtune.core.axes import RULES
from jaxtune.core.errors import UserError
from jaxtune.data.examples import Examples
from jaxtune.data.packing import Layout, PackedRow, build_batch, epoch_batches, row_length
from jaxtune.objectives.sft import Batch


@dataclass(frozen=True)
class Position:
    """Where a batch lies in the run.

    Attributes:
        epoch: epochs done after this batch, as a fraction.
        rows: its packed rows.

    """

    epoch: float
    rows: list[PackedRow]


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

    @cached_property
    def positions(self) -> list[Position]:
        """All batches in order."""
        found: list[Position] = []
        epoch = 0
        while len(found) < self._steps if self._steps is not None else epoch < self._epochs:
            batches = epoch_batches(self.examples.lengths, self.layout, epoch)
            found += [Position(epoch + (number + 1) / len(batches), rows) for number, rows in enumerate(batches)]
            epoch += 1
        return found[: self._steps]

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, index: int) -> Batch:
        """The arrays of batch `index`, [rows, length]."""
        rows = self.positions[index].rows
        return build_batch(rows, self.examples.items, self.layout.rows, row_length(rows, self.examples.lengths, self.layout))


def batches(plan: Plan, start: int, cuts: int, mesh: Mesh, ahead: int = 2) -> Iterator[tuple[int, Batch, Batch]]:
    """`(index, batch on the host, batch on the devices cut for accumulation)` from `start` to the end, prefetched.

    Args:
        plan: the sequence.
        start: index of the first batch.
        cuts: micro-batches per batch.
        mesh: the mesh over which rows are sharded.
        ahead: batches that are prepared in advance.

    """
    import grain

    def load(index: Any) -> tuple[int, Batch]:
        return int(index), plan.batch(int(index))

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
    for index, batch in grain.MapDataset.range(start, len(plan)).map(load).to_iter_dataset(options):
        yield index, batch, on_devices(batch, cuts, mesh)


def on_devices(batch: Batch, cuts: int, mesh: Mesh) -> Batch:
    """The batch as device arrays [cuts, rows, tokens], rows sharded over the mesh."""
    place = NamedSharding(mesh, RULES.spec((None, "batch", "seq")))
    return Batch(*(jax.device_put(_cut(part, cuts), place) for part in batch))


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


def _cut(part: np.ndarray, cuts: int) -> np.ndarray:
    return part.reshape(cuts, part.shape[0] // cuts, *part.shape[1:])
