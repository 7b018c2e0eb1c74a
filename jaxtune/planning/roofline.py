"""A roofline: the least time of a step by the chip's data sheet (Williams et al. 2009)."""

from dataclasses import dataclass
from typing import Any

from jaxtune.core.hardware import Chip
from jaxtune.planning.collectives import Collective

ASSUMPTIONS = (
    "products at the chip's bfloat16 peak; every frozen weight read from memory once in the "
    "forward pass and once or twice in the backward pass; collectives by rings at the data "
    "sheet's rate. The first time overlaps the three fully, the second not at all; whatever is "
    "not a matrix product costs extra"
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step on one device.

    Attributes:
        compute: of the matrix products.
        memory: of reading the weights.
        communication: of the collectives.

    """

    compute: float
    memory: float
    communication: float

    @property
    def least(self) -> float:
        """Return the seconds with perfect overlap."""
        return max(self.compute, self.memory, self.communication)

    @property
    def most(self) -> float:
        """Return the seconds without overlap of computation and communication."""
        return max(self.compute, self.memory) + self.communication


def estimate_step(
    chip: Chip,
    *,
    flops: float,
    weight_bytes: float,
    exchanged: list[Collective],
    slow_axes: set[str],
) -> Roofline:
    """Return the roofline of a step on one device.

    Args:
        chip: the device's data sheet.
        flops: of the step on this device.
        weight_bytes: bytes of frozen weights that it reads in all passes, gathered ones in full.
        exchanged: the collectives.
        slow_axes: the mesh axes that cross the network between slices or hosts.

    """
    seconds = {True: 0.0, False: 0.0}
    for collective in exchanged:
        is_slow = not slow_axes.isdisjoint(collective.axes)
        seconds[is_slow] += collective.sent / (chip.network if is_slow else chip.link)
    return Roofline(flops / chip.flops, weight_bytes / chip.bandwidth, sum(seconds.values()))


def sum_by_axis(exchanged: list[Collective]) -> dict[str, dict[str, Any]]:
    """Return the bytes that one device sends in a step and the number of collectives, by mesh axes
    and kind.
    """
    sums: dict[str, dict[str, Any]] = {}
    for collective in exchanged:
        kinds = sums.setdefault(" x ".join(collective.axes), {})
        kind = kinds.setdefault(collective.kind, {"bytes": 0, "count": 0})
        kind["bytes"] += collective.sent
        kind["count"] += collective.times
    return sums
