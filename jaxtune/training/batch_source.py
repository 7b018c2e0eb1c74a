"""Where the loop takes its batches from: given data, or what is made from the state."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from jaxtune.data.batch import Batch
from jaxtune.data.loader import BatchSchedule, DeviceBatch, batches, on_devices
from jaxtune.training.state import TrainState


class BatchSource(Protocol):
    """Batch i of a run, from the data or from the state before step i.

    A batch is a function of its index and of the state alone: that is what makes a run that was
    killed go on bit-identically. A source that ignores the state may prepare batches ahead, as
    `ScheduledBatches` does; one that reads it cannot, since the state of step i is there only once
    step i - 1 was dispatched. Each process of a run puts the rows of its own devices there.
    """

    @property
    def num_steps(self) -> int | None:
        """Return the number of batches of the whole run; None where it is not known beforehand."""
        ...

    def batch(self, index: int, state: TrainState) -> DeviceBatch | None:
        """Return a batch; None ends the run, where `num_steps` did not.

        Args:
            index: the number of the step, from 0; equal to `state.step`.
            state: the state before that step, which may still be being computed: reading a value
                of it waits for the device. The step is given its buffers, so keep none of it.

        """
        ...

    def epoch(self, index: int) -> float:
        """Return the epochs done after batch `index`, as a fraction, for the log."""
        ...


class ScheduledBatches:
    """The batches of data that is given beforehand, prefetched.

    Args:
        schedule: the sequence.
        micro_batches: micro-batches per batch.
        mesh: the devices.

    """

    def __init__(self, schedule: BatchSchedule, micro_batches: int, mesh: Mesh) -> None:
        self.schedule, self._micro_batches, self._mesh = schedule, micro_batches, mesh
        self._ahead: Iterator[DeviceBatch] | None = None
        self._next = 0

    @property
    def num_steps(self) -> int:
        """Return the length of the schedule."""
        return len(self.schedule)

    def batch(self, index: int, state: TrainState | None = None) -> DeviceBatch | None:
        """Return a batch; the ones after it are being prepared."""
        if index >= self.num_steps:
            return None
        if self._ahead is None or index != self._next:
            self._ahead = batches(self.schedule, index, self._micro_batches, self._mesh)
        loaded, self._next = next(self._ahead), index + 1
        if self._next == self.num_steps:
            self._ahead = None  # ends the thread that prepares
        return loaded

    def epoch(self, index: int) -> float:
        """Return the epochs done after batch `index`, as a fraction."""
        return self.schedule.epoch(index)


def to_devices(
    index: int, batch: Batch, micro_batches: int, mesh: Mesh, **metrics: float
) -> DeviceBatch:
    """Put a batch that every process has whole onto the devices, for a `BatchSource` to return.

    Args:
        index: its number in the run.
        batch: [rows, tokens], on the host; segment 0 is padding.
        micro_batches: micro-batches per batch.
        mesh: the devices.
        metrics: what the log shall say of it beside the step's own metrics.

    """
    tokens = int(np.count_nonzero(batch.segment_ids))
    padding = int(batch.input_ids.size) - tokens
    placed = on_devices(batch, micro_batches, mesh)
    return DeviceBatch(index, tokens, padding, placed, metrics)
