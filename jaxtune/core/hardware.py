"""Devices: their data sheets, their memory, and what programs and arrays take of it."""

import ctypes
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

_GIB = 2**30
_UNKNOWN = 8 * _GIB


@dataclass(frozen=True)
class Chip:
    """A chip's data sheet.

    Attributes:
        device_kind: JAX's name of it, or the beginning of that.
        flops: dense bfloat16 FLOP/s.
        memory: bytes that a program may use.
        bandwidth: memory bandwidth, bytes/s.
        link: bytes/s that one chip sends along one mesh axis within a slice or host.
        network: bytes/s that one chip sends between slices or hosts.

    """

    device_kind: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    network: float


# From the makers' data sheets; a TPU's memory is what its compiler lets a program use, and its
# `link` is both directions of one torus axis.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, int(31.25 * _GIB), 1.23e12, 90e9, 6.25e9),
    "v5e": Chip("TPU v5 lite", 197e12, int(15.75 * _GIB), 0.82e12, 90e9, 3.125e9),
    "v5p": Chip("TPU v5p", 459e12, int(95.74 * _GIB), 2.76e12, 180e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * _GIB), 1.64e12, 180e9, 12.5e9),
    "a100": Chip("NVIDIA A100", 312e12, int(79.1 * _GIB), 2.04e12, 300e9, 25e9),
    "h100": Chip("NVIDIA H100", 989e12, int(79.1 * _GIB), 3.35e12, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 989e12, int(139.8 * _GIB), 4.8e12, 450e9, 50e9),
}


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device kind, or None where it is unknown."""
    return next(
        (chip.flops for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)), None
    )


def platform() -> str:
    """Return `cpu`, `gpu` or `tpu`: the platform of the current mesh, whose devices need not exist
    (see `planning`), else this machine's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = (device.platform if device is not None else None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler counts them.

    Attributes:
        argument: weights, state and batch.
        output: results.
        alias: results that take the place of arguments.
        temp: temporaries.

    """

    argument: int
    output: int
    alias: int
    temp: int

    @classmethod
    def of(cls, program: Any) -> "Memory | None":
        """Return the memory of a compiled program; None where its platform does not report it."""
        analysis = program.memory_analysis()
        if analysis is None:
            return None
        names = ("argument", "output", "alias", "temp")
        return cls(*(getattr(analysis, f"{name}_size_in_bytes") for name in names))

    @property
    def peak(self) -> int:
        """Return an upper bound of the bytes in use: arguments, results that do not replace them,
        and temporaries, as if all were alive at once.
        """
        return self.argument + self.output - self.alias + self.temp


def bytes_per_device(tree: Any) -> int:
    """Return the bytes on one device of a tree of arrays, or of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += math.prod(shape) * (8 if key else leaf.dtype.itemsize)
    return total


def release_freed_memory() -> None:
    """Return freed memory, such as a compiler's, to the system where the C library keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def device_capacity() -> int:
    """Return the bytes of a device of this machine; CPU devices share the machine's memory."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    info = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in info.read_text().splitlines()) if info.exists() else {}
    total = int(lines["MemTotal"].split()[0]) * 1024 if "MemTotal" in lines else _UNKNOWN
    return total // jax.local_device_count()
