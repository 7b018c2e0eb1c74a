"""The device mesh of a run."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxtune.core.errors import UserError

SLICES, DATA, FSDP, CONTEXT, TENSOR = "slices", "data", "fsdp", "context", "tensor"
AXES = (SLICES, DATA, FSDP, CONTEXT, TENSOR)
BATCH = (SLICES, DATA, FSDP)
"""The axes that shard the rows of a batch."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    context: int = 1,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Make a mesh of all devices with the axes `slices`, `data`, `fsdp`, `context` and `tensor`.

    Neighbors on `tensor` are neighbors on the interconnect; only `slices` crosses the data-center
    network.

    Args:
        data: copies of the weights; one of the axes within a slice may be -1, all that remain.
        fsdp: shards of the weights, each with a part of the batch.
        tensor: shards of each matrix product.
        context: shards of each sequence.
        slices: groups of devices joined by the data-center network, each with a copy of the
            weights.
        devices: the devices to use; by default all of this process's platform.

    Raises:
        UserError: the product of the sizes is not the number of devices, or the devices lie on
            another number of slices.

    """
    devices = list(jax.devices() if devices is None else devices)
    requested = {SLICES: slices, DATA: data, FSDP: fsdp, CONTEXT: context, TENSOR: tensor}
    shape = _resolve_sizes(requested, len(devices))
    groups = _split_by_slice(devices, slices)
    grids = [_arrange(group, shape[1:]) for group in groups]
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _resolve_sizes(requested: dict[str, int], count: int) -> tuple[int, ...]:
    """Return the sizes of the axes, with the remaining devices in place of -1."""
    free = [name for name, size in requested.items() if size == -1]
    if zero := [name for name, size in requested.items() if size == 0]:
        raise UserError(
            f"mesh.{zero[0]} = 0: an axis has at least one device; -1 is all that remain."
        )
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, not {' and '.join(free)}.")
    given = math.prod(size for size in requested.values() if size != -1)
    rest = max(1, count // given)
    sizes = {name: rest if size == -1 else size for name, size in requested.items()}
    if math.prod(sizes.values()) != count:
        axes = ", ".join(f"{name}: {size}" for name, size in requested.items() if size != 1)
        raise UserError(
            f"mesh: {{{axes or 'fsdp: 1'}}} needs {math.prod(sizes.values())} devices and there "
            f"are {count}. {_nearest_mesh(sizes, free, count)}"
        )
    return tuple(sizes.values())


def _nearest_mesh(sizes: dict[str, int], free: list[str], count: int) -> str:
    """Suggest the mesh of `count` devices that is nearest to the requested one."""
    kept, rest = {}, count
    for name in (SLICES, TENSOR, CONTEXT, DATA):
        size = 1 if name in free else sizes[name]
        kept[name] = max(part for part in range(1, rest + 1) if rest % part == 0 and part <= size)
        rest //= kept[name]
    nearest = {name: size for name, size in kept.items() if size > 1} | {FSDP: rest}
    axes = ", ".join(f"{name}: {nearest[name]}" for name in AXES if name in nearest)
    return f"The nearest that fits: mesh: {{{axes}}}."


def _split_by_slice(devices: list[Any], slices: int) -> list[list[Any]]:
    """Return the devices of each slice. Devices without slices (GPUs, CPUs) are split in order, and
    so by hosts.

    Raises:
        UserError: the devices lie on another number of slices.

    """
    numbers = sorted({getattr(device, "slice_index", 0) or 0 for device in devices})
    if len(numbers) == 1:
        size = len(devices) // slices
        return [devices[at * size : (at + 1) * size] for at in range(slices)]
    if slices != len(numbers):
        raise UserError(
            f"mesh.slices = {slices}, and the devices lie on {len(numbers)} slices. Set "
            f"mesh.slices={len(numbers)}."
        )
    return [[device for device in devices if device.slice_index == number] for number in numbers]


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return the devices of a slice in the shape of its axes, laid out along its interconnect."""
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices, dtype=object).reshape(shape)
