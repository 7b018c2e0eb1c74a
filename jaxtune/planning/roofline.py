"""A roofline: what a step takes at least, by the chip's data sheet (Williams et al. 2009)."""

from dataclasses import dataclass
from typing import Any

from jaxtune.core.hardware import Chip
from jaxtune.planning.collectives import Collective

ASSUMPTIONS = (
    "products at the chip's bfloat16 peak; every frozen weight read from memory once in the "
    "forward pass and once or twice in the "
    "backward pass; collectives by rings at the data sheet's rate. The first time overlaps the "
    "three wholly, the second not at all; "
    "everything that is no matrix product costs extra"
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step on one device.

    Attributes:
        compute: of the matrix products.
        memory: of reading the weights.
        communication: of the collectives, over the axis that takes longest of those that run beside
            each other.

    """

    compute: float
    memory: float
    communication: float

    @property
    def least(self) -> float:
        """With perfect overlap."""
        return max(self.compute, self.memory, self.communication)

    @property
    def most(self) -> float:
        """Without any overlap."""
        return max(self.compute, self.memory) + self.communication


def estimate(
    chip: Chip,
    flops: int,
    devices: int,
    weights: int,
    passes: int,
    found: list[Collective],
    hosts: dict[str, bool],
) -> Estimate:
    """The roofline of a step.

    Args:
        chip: what one chip has.
        flops: of the step, over all devices.
        devices: how many there are.
        weights: bytes of the frozen weights that one device reads in a pass, gathered ones whole.
        passes: how often they are read.
        found: the collectives.
        hosts: whether each mesh axis crosses the slower network.

    """
    seconds: dict[bool, float] = {True: 0.0, False: 0.0}
    for one in found:
        slow = any(hosts[axis] for axis in one.axes)
        seconds[slow] += one.sent / (chip.network if slow else chip.link)
    return Estimate(
        flops / devices / chip.flops, weights * passes / chip.bandwidth, sum(seconds.values())
    )


def by_axis(found: list[Collective]) -> dict[str, dict[str, Any]]:
    """Bytes that one device sends in a step and how many collectives there are, by the mesh axes
    and the kind.
    """
    sums: dict[str, dict[str, Any]] = {}
    for one in found:
        kinds = sums.setdefault(" x ".join(one.axes), {})
        kind = kinds.setdefault(one.kind, {"bytes": 0, "count": 0})
        kind["bytes"] += one.sent
        kind["count"] += one.times
    return sums
