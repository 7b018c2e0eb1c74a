"""What kind of device a program is being made for."""

import jax


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the current mesh, whose devices may be described only (see `plan`), else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = (device.platform if device is not None else None) or jax.default_backend()
    return "gpu" if found in ("cuda", "rocm") else found
