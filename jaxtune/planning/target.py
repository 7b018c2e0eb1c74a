"""Hardware to plan for: TPU topologies and GPU hosts by name."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from jaxtune.core.errors import UserError, first_line, listed, nearest
from jaxtune.core.hardware import CHIPS, Chip

HERE = "here"

_TPUS, _GPUS_PER_HOST = ("v4", "v5e", "v5p", "v6e"), 8
_ACCELERATORS = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}


@dataclass(frozen=True)
class Target:
    """The hardware that a plan is for.

    Attributes:
        name: as the user wrote it.
        kind: a key of `CHIPS`, or None for this machine.
        topology: chips along each dimension of a TPU slice, such as 4x4; empty otherwise.
        slices: the number of TPU slices.
        devices: the number of devices; 0 for this machine, which has its own.

    """

    name: str
    kind: str | None
    topology: str = ""
    slices: int = 1
    devices: int = 0

    @property
    def chip(self) -> Chip | None:
        """Return the chip's data sheet; None for this machine."""
        return CHIPS[self.kind] if self.kind else None

    @property
    def platform(self) -> str:
        """Return JAX's name of the platform to compile for."""
        return "tpu" if self.kind in _TPUS else "cuda"

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that compiles for it; JAX reads it on import."""
        kind = _ACCELERATORS.get(self.kind or "", "v5litepod")
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": os.environ.get(
                "JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0"
            ),
            "TPU_ACCELERATOR_TYPE": f"{kind}-{max(1, self.devices // self.slices)}",
        }

    def find_devices(self) -> list[Any]:
        """Return descriptions of the devices; call it in a process with this target's environment.

        Raises:
            UserError: the compiler for it is not installed, or has no such topology.

        """
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if self.platform == "tpu":
            options = {"platform": "tpu", "topology_name": f"{self.kind}:{self.topology}"}
            options |= {"num_slices": self.slices} if self.slices > 1 else {}
            options |= {"chips_per_host_bounds": (1, 1, 1)} if self.devices == 1 else {}
        else:
            hosts, per_host = -(-self.devices // _GPUS_PER_HOST), min(self.devices, _GPUS_PER_HOST)
            options = {
                "platform": "cuda",
                "topology_name": "",
                "target_config": _gpu_description(self.kind or ""),
                "topology": f"1x{hosts}x{per_host}",
            }
        try:
            return list(topologies.get_topology_desc(**options).devices)
        except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
            # JAX and the compilers raise any of these where one is missing or has no such topology.
            package = "'jaxtune[plan]'" if self.platform == "tpu" else "jax-cuda13-plugin"
            raise UserError(
                f"{self.name}: its compiler cannot be used here ({first_line(error)}). If it is "
                f"not installed: pip install {package}"
            ) from None


def parse_target(name: str) -> Target:
    """Return the target that a user's string names.

    Raises:
        UserError: there is no such target.

    """
    if name == HERE:
        return Target(name, None)
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w+):(\d+(?:x\d+)*)", name.strip().lower())
    if match is None or match[2] not in CHIPS:
        known = ["here", "v5e:4x4", "v5p:4x4x4", "v6e:8x8", "2*v5e:4x4", "h100:16", "h200:8"]
        raise UserError(
            f"--on {name}: no such target; there are {listed(CHIPS)}, as in "
            f"{', '.join(known)}.{nearest(name, known)}"
        )
    slices, kind, sizes = int(match[1] or 1), match[2], [int(size) for size in match[3].split("x")]
    count = math.prod(sizes)
    if min(*sizes, slices) < 1:
        raise UserError(f"--on {name}: a size is 0.")
    if kind not in _TPUS:
        if len(sizes) > 1 or slices > 1 or (count > _GPUS_PER_HOST and count % _GPUS_PER_HOST):
            raise UserError(
                f"--on {name}: GPUs are given by their number, such as {kind}:8; more than "
                f"{_GPUS_PER_HOST} are a multiple of it."
            )
        return Target(name, kind, devices=count)
    dimensions = 2 if kind in ("v5e", "v6e") else 3
    if len(sizes) != dimensions:
        raise UserError(
            f"--on {name}: a {kind} slice has {dimensions} dimensions, such as "
            f"{kind}:{'x'.join(['4'] * dimensions)}."
        )
    return Target(name, kind, match[3], slices, count * slices)


def _gpu_description(kind: str) -> str:
    """Return XLA's description of a GPU."""
    core, memory, clock, bandwidth, cache, version = {
        "a100": (108, 84929347584, 1.41, 2039000000000, 41943040, "major: 8"),
        "h100": (132, 84929347584, 1.98, 3352320000000, 52428800, "major: 9"),
        "h200": (132, 150109945856, 1.98, 4800000000000, 62914560, "major: 9"),
    }[kind]
    shared = (167936, 166912) if kind == "a100" else (233472, 232448)
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared[0]} threads_per_core_limit: 2048
  core_count: {core} fpus_per_core: {64 if kind == "a100" else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared[1]} cuda_compute_capability {{ {version} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "NVIDIA {kind.upper()}"
"""
