"""Logical axis names of arrays, and the one table that maps them to mesh axes."""

import math
from dataclasses import dataclass, fields

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

type_axis = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """Where each logical axis lies on the mesh; changing a strategy edits one such object.

    A parameter's axes are shardable names (`embed`, `mlp`, `heads`, ...), an activation's `batch`, `seq`, `act_embed`, ...
    """

    batch: type_axis = ("data", "fsdp")
    seq: type_axis = None
    act_embed: type_axis = None
    act_heads: type_axis = "tensor"
    act_mlp: type_axis = "tensor"
    embed: type_axis = "fsdp"
    heads: type_axis = "tensor"
    kv_heads: type_axis = "tensor"
    mlp: type_axis = "tensor"
    vocab: type_axis = "tensor"
    expert: str = "tensor"
    rank: type_axis = None
    layers: type_axis = None

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical names.

        Raises:
            ValueError: two dimensions of one array would lie on the same mesh axis, or a name is unknown.

        """
        known = {field.name for field in fields(self)}
        if unknown := [axis for axis in axes if axis is not None and axis not in known]:
            raise ValueError(f"Unknown logical axes {unknown}; known are {sorted(known)}.")
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
        if len(used) != len(set(used)):
            raise ValueError(f"Axes {axes} map to {entries}: a mesh axis is used twice.")
        return PartitionSpec(*entries)


RULES = Rules()


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = RULES) -> NamedSharding:
    """The sharding of a parameter; a dimension that does not divide over its mesh axis is kept whole.

    Args:
        mesh: the device mesh.
        axes: logical names of the trailing dimensions; leading ones (stacked layers) are not sharded.
        shape: the array's shape.
        rules: the table of axes.

    """
    spec = (None,) * (len(shape) - len(axes)) + tuple(rules.spec(axes))
    kept = [entry if size % _parts(mesh, entry) == 0 else None for size, entry in zip(shape, spec, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept))


def vocab_parts(mesh: Mesh, rules: Rules = RULES) -> int:
    """Into how many parts the mesh cuts the vocabulary."""
    return _parts(mesh, rules.vocab)


def _parts(mesh: Mesh, entry: type_axis) -> int:
    return math.prod(mesh.shape[name] for name in ((entry,) if isinstance(entry, str) else entry or ()))


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Pin an activation's layout on the current mesh; without a mesh of several devices it is `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(axes))
