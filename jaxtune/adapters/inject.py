"""Which layers get an adapter, and putting it there."""

import zlib
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxtune.adapters.lora import LoRAConfig, LoRALinear, LoRAParam
from jaxtune.core.axes import sharding
from jaxtune.core.errors import UserError, listed, nearest
from jaxtune.models.layers import Linear

ALL_LINEAR = "all-linear"


def linears(model: nnx.Module) -> dict[str, Linear]:
    """The linear layers of the decoder's blocks by dotted path; the head is not among them."""
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    return {path: found[path] for path in sorted(found) if ".layers." in path}


def matching(model: nnx.Module, targets: str | Sequence[str]) -> dict[str, Linear]:
    """The linear layers that `targets` names.

    Args:
        model: the model.
        targets: `all-linear`, or module names; a name means every layer whose path ends with it.

    Raises:
        UserError: a name matches nothing; with the candidates.

    """
    candidates = linears(model)
    if targets == ALL_LINEAR:
        return candidates
    chosen: dict[str, Linear] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        found = {path: module for path, module in candidates.items() if path == target or path.endswith("." + target)}
        if not found:
            names = sorted({path.rpartition(".")[2] for path in candidates})
            raise UserError(
                f"adapter.targets: '{target}' matches no module; there are {listed(names, 20)}, or all-linear.{nearest(target, names)}"
            )
        chosen |= found
    return chosen


def inject(model: nnx.Module, targets: str | Sequence[str], config: LoRAConfig, seed: int, mesh: Mesh) -> list[str]:
    """Put an adapter on the chosen layers of `model`, in place.

    A layer's draw depends on the seed and its path only, not on which other layers have an adapter.

    Returns:
        The paths of the adapted layers.

    """
    chosen = matching(model, targets)
    for path, linear in chosen.items():
        *parents, name = path.split(".")
        parent = model
        for part in parents:
            parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        adapted = LoRALinear(linear, path, config, key)
        for factor in (adapted.lora_A, adapted.lora_B):
            factor.set_value(jax.device_put(factor[...], sharding(mesh, factor.get_metadata()["axes"], factor.shape)))
        setattr(parent, name, adapted)
    return list(chosen)


def adapted(model: nnx.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by path."""
    return {path: module for path, module in linears(model).items() if isinstance(module, LoRALinear)}


def split_trainable(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`(graphdef, trainable, frozen)`: the adapters' factors and everything else."""
    graph, trainable, frozen = nnx.split(model, LoRAParam, ...)
    return graph, trainable, frozen
