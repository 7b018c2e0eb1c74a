"""What a compiler says of a program that does not fit."""

import re
from typing import Any, NamedTuple

_EXCEEDS = re.compile(r"([\d.]+)([KMGT])\)? exceeds available HBM \(?([\d.]+)([KMGT])")
_BUFFER = re.compile(r"Size: ([\d.]+)([KMGT]).*?Shape: (\S+)", re.DOTALL)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class MemoryShortage(NamedTuple):
    """The memory of a device that a program exceeds, in bytes.

    Attributes:
        needed: the bytes that the program needs.
        available: the bytes that there are.

    """

    needed: int
    available: int


def memory_shortage(message: str) -> MemoryShortage | None:
    """Return the shortage that an error message states; None where it states another error."""
    match = _EXCEEDS.search(message)
    if match is None:
        return None
    return MemoryShortage(_bytes(match[1], match[2]), _bytes(match[3], match[4]))


def largest_buffers(message: str, limit: int) -> list[dict[str, Any]]:
    """Return the largest buffers that an error message lists, as `array` and `bytes`."""
    buffers = _BUFFER.findall(message)[:limit]
    return [{"array": shape, "bytes": _bytes(size, unit)} for size, unit, shape in buffers]


def _bytes(size: str, unit: str) -> int:
    return round(float(size) * _UNITS[unit])
