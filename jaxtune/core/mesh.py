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
"""The axes over which the rows of a batch are spread."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    context: int = 1,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices with the axes `slices`, `data`, `fsdp`, `context` and `tensor`.

    Neighbors on `tensor` are neighbors on the interconnect; only `slices` crosses the data-center
    network.

    Args:
        data: copies of the weights; one of the axes within a slice may be -1, what is left.
        fsdp: parts of the weights, each with its part of the batch.
        tensor: parts of each matrix product.
        context: parts of each sequence.
        slices: groups of devices joined by the data-center network, each with a copy of the
            weights.
        devices: the devices to use; all of this process's platform by default.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or the slices are not those
            that there are.

    """
    devices = list(jax.devices() if devices is None else devices)
    asked = {SLICES: slices, DATA: data, FSDP: fsdp, CONTEXT: context, TENSOR: tensor}
    shape = _sizes(asked, len(devices))
    groups = _by_slice(devices, slices)
    within = [_arranged(group, shape[1:]) for group in groups]
    return Mesh(np.stack(within), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(asked: dict[str, int], count: int) -> tuple[int, ...]:
    """The axes' sizes with what is left put in for -1."""
    free = [name for name, size in asked.items() if size == -1]
    if zero := [name for name, size in asked.items() if size == 0]:
        raise UserError(
            f"mesh.{zero[0]} = 0: an axis has at least one device; -1 takes what is left."
        )
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, not {' and '.join(free)}.")
    given = math.prod(size for size in asked.values() if size != -1)
    sizes = {name: max(1, count // given) if size == -1 else size for name, size in asked.items()}
    if math.prod(sizes.values()) != count:
        shown = (
            ", ".join(f"{name}: {size}" for name, size in asked.items() if size != 1) or "fsdp: 1"
        )
        raise UserError(
            f"mesh: {{{shown}}} needs {math.prod(sizes.values())} devices and there are {count}. "
            f"{_nearest_mesh(sizes, free, count)}"
        )
    return tuple(sizes.values())


def _nearest_mesh(sizes: dict[str, int], free: list[str], count: int) -> str:
    """A mesh near the one asked for that has as many devices as there are."""
    kept, left = {}, count
    for name in (SLICES, TENSOR, CONTEXT, DATA):
        size = 1 if name in free else sizes[name]
        kept[name] = max(part for part in range(1, left + 1) if left % part == 0 and part <= size)
        left //= kept[name]
    found = {name: size for name, size in kept.items() if size > 1} | {FSDP: left}
    return (
        "The nearest that fits: mesh: {"
        + ", ".join(f"{name}: {found[name]}" for name in AXES if name in found)
        + "}."
    )


def _by_slice(devices: list[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice. Devices that are on no slices of their own (GPUs, CPUs) are cut in
    order, so by hosts.

    Raises:
        UserError: the devices lie on several slices, but not on so many.

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


def _arranged(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices of one slice in the shape of the axes within it, as lies well on its
    interconnect.
    """
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices, dtype=object).reshape(shape)
