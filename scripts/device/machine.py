#!/usr/bin/env python
"""What this machine is, and the two rates that the others are measured by: of large bfloat16
products and of copies in the device's memory.
"""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import findings  # noqa: E402 (the path above)

from jaxtune.core.hardware import peak_flops  # noqa: E402 (likewise)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "peft",
            "liger-kernel")  # fmt: skip


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def seconds(run, *arrays, times=10):
    """The middle of several runs' seconds, after two that warm up."""
    all_seconds = []
    for number in range(2 + times):
        began = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        if number > 1:
            all_seconds.append(time.perf_counter() - began)
    return statistics.median(all_seconds)


def first_device():
    """The device, which without a GPU is there in a dry run only."""
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        sys.exit(f"There is no GPU that JAX can use: {error}")
    if device.platform == "cpu" and os.environ["JAX_PLATFORMS"] != "cpu":
        sys.exit("There is no GPU that JAX can use. --dry-run tries all parts on the CPU.")
    return device


def main():
    device = first_device()
    small = device.platform == "cpu"
    stats = device.memory_stats() or {}
    findings.add(
        "machine", device=device.device_kind, platform=device.platform, devices=jax.device_count(),
        peak_flops=peak_flops(device.device_kind),
        memory=stats.get("bytes_limit"), cores=os.cpu_count(), python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
    )  # fmt: skip
    size = 512 if small else 8192
    left, right = (
        jax.random.normal(jax.random.key(number), (size, size), jnp.bfloat16) for number in (0, 1)
    )
    took = seconds(jax.jit(jnp.matmul), left, right)
    findings.add("products", size=size, flops=2 * size**3 / took)
    large = jax.random.normal(jax.random.key(2), (2**24 if small else 2**31,), jnp.bfloat16)
    took = seconds(jax.jit(lambda x: x + 1), large)
    findings.add("copies", bytes_per_second=2 * large.nbytes / took)


if __name__ == "__main__":
    main()
