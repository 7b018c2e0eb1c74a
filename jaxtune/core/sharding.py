"""The logical axes of arrays, and the one table that maps them to mesh axes."""

import math
from dataclasses import dataclass, fields

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxtune.core.mesh import BATCH, CONTEXT, DATA, FSDP, SLICES, TENSOR

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """The mesh axes of each logical axis; another sharding strategy is another such object.

    Parameters have axes such as `embed`, `mlp` and `heads`, activations `batch` and `seq`.
    Between layers, where activations are kept for the backward pass, a sequence is sharded over the
    tensor axis too (`kept_seq`; Korthikanti et al. 2022, sequence parallelism): summing a product
    over its shards and sharding the sequence are one reduce-scatter.
    """

    batch: MeshAxes = BATCH
    lookup: MeshAxes = (SLICES, DATA)
    seq: MeshAxes = CONTEXT
    kept_seq: MeshAxes = (CONTEXT, TENSOR)
    tokens: MeshAxes = (*BATCH, CONTEXT)
    act_embed: MeshAxes = None
    act_heads: MeshAxes = TENSOR
    act_mlp: MeshAxes = TENSOR
    embed: MeshAxes = FSDP
    heads: MeshAxes = TENSOR
    kv_heads: MeshAxes = TENSOR
    mlp: MeshAxes = TENSOR
    vocab: MeshAxes = TENSOR
    expert: str = TENSOR
    rank: MeshAxes = None
    layers: MeshAxes = None

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Return the partition of an array whose dimensions have these logical axes.

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
    """Return the partition of an array of this shape: each dimension is sharded over as many of its
    mesh axes, from the first, as divide it.

    Args:
        mesh: the device mesh.
        axes: logical axes of the trailing dimensions; leading ones (stacked layers) are not
            sharded.
        shape: the array's shape.
        rules: the table of axes.

    """
    spec = (None,) * (len(shape) - len(axes)) + tuple(rules.spec(axes))
    entries = zip(shape, spec, strict=True)
    return PartitionSpec(*(_dividing_axes(mesh, entry, size) for size, entry in entries))


def sharding(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = RULES
) -> NamedSharding:
    """Return the sharding of a parameter; see `partition_spec`."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, rules))


def axis_size(mesh: Mesh | AbstractMesh, axis: str, rules: Rules = RULES) -> int:
    """Return the number of shards of a logical axis on a mesh."""
    return math.prod(mesh.shape[name] for name in _names(getattr(rules, axis)))


def is_multi_device() -> bool:
    """Return whether the current mesh has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def num_shards(axis: str, size: int) -> int:
    """Return the number of shards of a logical axis of this size on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    axes = _dividing_axes(mesh, getattr(RULES, axis), size)
    return math.prod(mesh.shape[name] for name in _names(axes))


def divides_evenly(axis: str, size: int) -> bool:
    """Return whether the current mesh divides a logical axis of this size into equal shards."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and size % axis_size(mesh, axis) == 0


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Constrain an activation's sharding on the current mesh; with one device return `x` itself."""
    if not is_multi_device():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape, rules))


def _names(entry: MeshAxes) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _dividing_axes(mesh: Mesh | AbstractMesh, entry: MeshAxes, size: int) -> MeshAxes:
    """Return the leading mesh axes whose product divides a size."""
    kept: list[str] = []
    for name in _names(entry):
        if size % math.prod(mesh.shape[axis] for axis in (*kept, name)):
            break
        kept.append(name)
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None
