"""The device mesh of a run."""

import jax
from jax.sharding import AxisType, Mesh

from jaxtune.core.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices with the axes `data`, `fsdp` and `tensor`.

    Args:
        data: copies of the weights; one of the three may be -1, what is left.
        fsdp: parts of the weights, each with its part of the batch.
        tensor: parts of each matrix product.
        devices: the devices to use; all of this process's platform by default.

    Raises:
        UserError: the sizes do not multiply to the number of devices.

    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    given = 1
    for size in sizes.values():
        given *= 1 if size == -1 else size
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, not {' and '.join(free)}.")
    if free:
        sizes[free[0]] = max(1, len(devices) // given)
        given *= sizes[free[0]]
    if given != len(devices):
        asked = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise UserError(
            f"mesh: {{{asked}}} needs {given} devices and there are {len(devices)}. Set one axis to -1 to take what is left."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
