"""Logical axis names of arrays, and the one table that maps them to mesh axes."""

import math
from dataclasses import dataclass, fields

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxtune.core.mesh import BATCH, CONTEXT, DATA, FSDP, SLICES, TENSOR

type_axis = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """Where each logical axis lies on the mesh; changing a strategy edits one such object.

    A parameter's axes are shardable names (`embed`, `mlp`, `heads`, ...), an activation's `batch`,
    `seq`, `act_embed`, ... Between layers, where activations wait for the backward pass, a sequence
    is cut over the tensor axis too (`kept_seq`; Korthikanti et al. 2022, sequence parallelism): the
    sum over the parts of a product and the cut are one reduce-scatter.
    """

    batch: type_axis = BATCH
    lookup: type_axis = (SLICES, DATA)
    seq: type_axis = CONTEXT
    kept_seq: type_axis = (CONTEXT, TENSOR)
    tokens: type_axis = (*BATCH, CONTEXT)
    act_embed: type_axis = None
    act_heads: type_axis = TENSOR
    act_mlp: type_axis = TENSOR
    embed: type_axis = FSDP
    heads: type_axis = TENSOR
    kv_heads: type_axis = TENSOR
    mlp: type_axis = TENSOR
    vocab: type_axis = TENSOR
    expert: str = TENSOR
    rank: type_axis = None
    layers: type_axis = None

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical names.

        Raises:
            ValueError: two dimensions of one array would lie on the same mesh axis, or a name is
                unknown.

        """
        known = {field.name for field in fields(self)}
        if unknown := [axis for axis in axes if axis is not None and axis not in known]:
            raise ValueError(f"Unknown logical axes {unknown}; known are {sorted(known)}.")
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for entry in entries for name in _names(entry)]
        if len(used) != len(set(used)):
            raise ValueError(f"Axes {axes} map to {entries}: a mesh axis is used twice.")
        return PartitionSpec(*entries)


RULES = Rules()


def partition_spec(
    mesh: Mesh | AbstractMesh,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    rules: Rules = RULES,
) -> PartitionSpec:
    """The partition of an array of this shape: of the mesh axes of a dimension as many, from the
    first, as divide it.

    Args:
        mesh: the device mesh.
        axes: logical names of the trailing dimensions; leading ones (stacked layers) are not
            sharded.
        shape: the array's shape.
        rules: the table of axes.

    """
    spec = (None,) * (len(shape) - len(axes)) + tuple(rules.spec(axes))
    return PartitionSpec(
        *(_dividing(mesh, entry, size) for size, entry in zip(shape, spec, strict=True))
    )


def sharding(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = RULES
) -> NamedSharding:
    """The sharding of a parameter; see `partition_spec`."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, rules))


def axis_size(mesh: Mesh | AbstractMesh, axis: str, rules: Rules = RULES) -> int:
    """Into how many parts the mesh cuts a logical axis."""
    return math.prod(mesh.shape[name] for name in _names(getattr(rules, axis)))


def is_multi_device() -> bool:
    """Whether the current mesh has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def num_shards(axis: str, size: int) -> int:
    """Into how many parts the current mesh cuts a logical axis of this size."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        1
        if mesh.empty
        else math.prod(
            mesh.shape[name] for name in _names(_dividing(mesh, getattr(RULES, axis), size))
        )
    )


def divides_evenly(axis: str, size: int) -> bool:
    """Whether the current mesh cuts a logical axis of this size into equal parts."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and size % axis_size(mesh, axis) == 0


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Pin an activation's layout on the current mesh; without a mesh of several devices it is
    `x` itself.
    """
    if not is_multi_device():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape, rules))


def _names(entry: type_axis) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _dividing(mesh: Mesh | AbstractMesh, entry: type_axis, size: int) -> type_axis:
    kept: list[str] = []
    for name in _names(entry):
        if size % math.prod(mesh.shape[one] for one in (*kept, name)):
            break
        kept.append(name)
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None
