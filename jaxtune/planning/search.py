"""Trying meshes, remat policies, micro-batches and dtypes for a target: for every mesh what fits
with the least recomputation.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from jaxtune.config.load import with_keys
from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.planning.planner import Plan, default_parallel, plan
from jaxtune.planning.target import Target, parse

_TENSOR = (1, 2, 4, 8, 16)
_CONTEXT = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Found:
    """A configuration that fits.

    Attributes:
        keys: what it sets, by dotted key.
        plan: its plan.

    """

    keys: dict[str, Any]
    plan: Plan


def search(
    config: Config, on: str, progress: Callable[[int, int], None] | None = None, best: int = 5
) -> list[Found]:
    """The fastest configurations that fit, by the estimate without overlap, the fastest first.

    Args:
        config: where to begin; its batch size, lengths and method stay.
        on: a target other than `here`.
        progress: called with meshes done and meshes in all.
        best: how many.

    Raises:
        UserError: no such target, or one that cannot be searched.

    """
    target = parse(on)
    if target.kind is None:
        raise UserError(
            "--search needs a target such as v5e:4x4: for this machine there is no estimate of "
            "speed."
        )
    meshes = list(_meshes(config, target))
    if not meshes:
        raise UserError(
            f"--search: train.batch_size = {config.train.batch_size} and data.max_length = "
            f"{config.data.max_length} divide over "
            f"{target.devices} devices in no way. Change one of them."
        )
    found, done = [], 0
    with ThreadPoolExecutor(default_parallel()) as pool:
        for job in as_completed(
            [pool.submit(_first_that_fits, config, on, mesh) for mesh in meshes]
        ):
            done += 1
            found += [job.result()] if job.result() else []
            if progress:
                progress(done, len(meshes))
    return sorted(found, key=lambda one: -one.plan.tokens_per_second[1])[:best]


def _meshes(config: Config, target: Target) -> Iterator[dict[str, int]]:
    """Meshes over the target's devices over which rows and tokens divide; context parallelism
    only where rows are too few.
    """
    each = target.devices // target.slices
    for tensor in _TENSOR:
        for context in _CONTEXT:
            if each % (tensor * context) or config.data.max_length % context:
                continue
            fsdp = each // tensor // context
            if config.train.batch_size % (fsdp * target.slices) == 0:
                yield {
                    "slices": target.slices,
                    "data": 1,
                    "fsdp": fsdp,
                    "context": context,
                    "tensor": tensor,
                }
                break


def _first_that_fits(config: Config, on: str, mesh: dict[str, int]) -> Found | None:
    for further in _ladder(config, mesh):
        keys = {f"mesh.{axis}": size for axis, size in mesh.items()} | further
        made = plan(with_keys(config, keys), on)
        if made.fits:
            return Found(keys, made)
    return None


def _ladder(config: Config, mesh: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Ever less memory: more recomputation, fewer rows at a time, fewer bits a weight."""
    yield {"train.remat": "dots"}
    yield {"train.remat": "full"}
    yield {"train.remat": "offload"}
    rows, least = config.train.batch_size, mesh["slices"] * mesh["data"] * mesh["fsdp"]
    while rows > least and rows % 2 == 0 and (rows // 2) % least == 0:
        rows //= 2
        yield {"train.remat": "full", "train.micro_batch_size": rows}
    if config.model.dtype in ("int8", "nf4") or (
        config.adapter.method == "none" and config.trainable == "all"
    ):
        return
    for dtype in ("int8", "nf4"):
        yield {"train.remat": "full", "train.micro_batch_size": rows, "model.dtype": dtype}
