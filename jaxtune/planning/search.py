"""Search meshes, remat policies, micro-batches and dtypes for a target: for every mesh, the
configuration that fits with the least recomputation.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from jaxtune.config.load import with_keys
from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.planning.planner import Plan, default_parallel, plan
from jaxtune.planning.target import Target, parse_target

_TENSOR = (1, 2, 4, 8, 16)
_CONTEXT = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class FittingConfig:
    """A configuration that fits.

    Attributes:
        keys: the values that it sets, by dotted key.
        plan: its plan.

    """

    keys: dict[str, Any]
    plan: Plan


def search(
    config: Config, on: str, progress: Callable[[int, int], None] | None = None, best: int = 5
) -> list[FittingConfig]:
    """Return the fastest configurations that fit, the fastest first, by the estimate without
    overlap.

    Args:
        config: the start; its batch size, lengths and method stay.
        on: a target other than `here`.
        progress: called with the meshes done and the meshes in all.
        best: the number of configurations to return.

    Raises:
        UserError: no such target, or one that cannot be searched.

    """
    target = parse_target(on)
    if target.kind is None:
        raise UserError(
            "--search needs a target such as v5e:4x4: for this machine there is no estimate of "
            "speed."
        )
    meshes = list(_meshes(config, target))
    if not meshes:
        raise UserError(
            f"--search: no mesh of {target.devices} devices divides train.batch_size = "
            f"{config.train.batch_size} and data.max_length = {config.data.max_length}. Change "
            "one of them."
        )
    fitting, done = [], 0
    with ThreadPoolExecutor(default_parallel()) as pool:
        jobs = [pool.submit(_first_that_fits, config, on, mesh) for mesh in meshes]
        for job in as_completed(jobs):
            done += 1
            fitting += [job.result()] if job.result() else []
            if progress:
                progress(done, len(meshes))
    return sorted(fitting, key=lambda entry: -entry.plan.tokens_per_second[1])[:best]


def _meshes(config: Config, target: Target) -> Iterator[dict[str, int]]:
    """Yield the meshes of the target's devices that divide rows and tokens; context parallelism
    only where there are too few rows.
    """
    per_slice = target.devices // target.slices
    for tensor in _TENSOR:
        for context in _CONTEXT:
            if per_slice % (tensor * context) or config.data.max_length % context:
                continue
            fsdp = per_slice // tensor // context
            if config.train.batch_size % (fsdp * target.slices) == 0:
                yield {
                    "slices": target.slices,
                    "data": 1,
                    "fsdp": fsdp,
                    "context": context,
                    "tensor": tensor,
                }
                break


def _first_that_fits(config: Config, on: str, mesh: dict[str, int]) -> FittingConfig | None:
    for further in _settings(config, mesh):
        keys = {f"mesh.{axis}": size for axis, size in mesh.items()} | further
        result = plan(with_keys(config, keys), on)
        if result.fits:
            return FittingConfig(keys, result)
    return None


def _settings(config: Config, mesh: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield settings that take ever less memory: more recomputation, fewer rows at a time, fewer
    bits per weight.
    """
    yield {"train.remat": "dots"}
    yield {"train.remat": "full"}
    yield {"train.remat": "offload"}
    rows, fewest = config.train.batch_size, mesh["slices"] * mesh["data"] * mesh["fsdp"]
    while rows > fewest and rows % 2 == 0 and (rows // 2) % fewest == 0:
        rows //= 2
        yield {"train.remat": "full", "train.micro_batch_size": rows}
    trains_all_weights = config.adapter.method == "none" and config.trainable == "all"
    if config.model.dtype in ("int8", "nf4") or trains_all_weights:
        return
    for dtype in ("int8", "nf4"):
        yield {"train.remat": "full", "train.micro_batch_size": rows, "model.dtype": dtype}
