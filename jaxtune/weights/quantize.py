"""Quantize matrices one at a time as they are read: NF4 as in QLoRA, and int8 by rows."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.core.errors import UserError
from jaxtune.core.sharding import sharding
from jaxtune.models.kernels.quantized import (
    BLOCK,
    NF4,
    NF4_CODES,
    SCALES,
    Int8Rows,
    QuantizedTensor,
    decode_dynamic,
    split_columns,
)

KINDS = ("int8", "nf4")


def check_quantizable(name: str, shape: tuple[int, ...], kind: str) -> None:
    """Check that a matrix consists of whole blocks.

    Raises:
        UserError: it does not.

    """
    if kind == "nf4" and shape[-1] % BLOCK:
        raise UserError(
            f"model.dtype=nf4: {name} has rows of {shape[-1]} numbers, not a multiple of {BLOCK}. "
            "Use model.dtype=int8."
        )


def quantize(
    matrices: Iterable[np.ndarray],
    stack: tuple[int, ...],
    axes: tuple[str | None, ...],
    mesh: Mesh,
    kind: str,
) -> QuantizedTensor:
    """Quantize matrices into one leaf on the mesh, holding one original in memory at a time.

    Args:
        matrices: [out, in] each, in the order of the stack.
        stack: sizes of the leading axes.
        axes: logical names of out and in, before them those of a stack that is sharded.
        mesh: where the leaf goes.
        kind: `nf4` or `int8`.

    """
    rounded = [
        jax.tree.map(np.asarray, _ROUND[kind](np.asarray(matrix, np.float32)))
        for matrix in matrices
    ]
    whole: Any = jax.tree.map(
        lambda *parts: np.stack(parts).reshape(*stack, *parts[0].shape), *rounded
    )
    return _place(whole, axes, mesh, _put)


def quantized_shapes(
    shape: tuple[int, ...],
    stack: tuple[int, ...],
    axes: tuple[str | None, ...],
    mesh: Mesh,
    kind: str,
) -> QuantizedTensor:
    """Return shapes, dtypes and shardings of what `quantize` makes of matrices of this shape."""
    rounded = jax.eval_shape(_ROUND[kind], jax.ShapeDtypeStruct(shape, jnp.float32))
    whole: Any = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct((*stack, *part.shape), part.dtype), rounded
    )
    return _place(
        whole,
        axes,
        mesh,
        lambda part, place: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=place),
    )


def _place(
    whole: QuantizedTensor,
    axes: tuple[str | None, ...],
    mesh: Mesh,
    put: Callable[[Any, NamedSharding], Any],
) -> QuantizedTensor:
    if isinstance(whole, Int8Rows):
        place = sharding(mesh, axes, whole.codes.shape)
        return Int8Rows(
            put(whole.codes, place),
            put(whole.scales, NamedSharding(mesh, PartitionSpec(*place.spec[:-1]))),
        )
    assert isinstance(whole, NF4)
    place = sharding(mesh, axes, whole.scales.shape)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NF4(
        put(whole.codes, place),
        put(whole.scales, place),
        put(whole.wide, everywhere),
        put(whole.offset, everywhere),
    )


def _put(values: Any, place: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, place, lambda index: values[index])


@jax.jit
def to_nf4(matrix: jax.Array) -> NF4:
    """Return the nearest codes, and the scales rounded by the dynamic map around their mean
    (Dettmers et al. 2023, section 3).

    Args:
        matrix: [out, in], float32; in is a multiple of 64.

    """
    outputs, inputs = matrix.shape
    blocks = matrix.reshape(outputs, inputs // BLOCK, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    codes = _nearest(
        blocks / jnp.where(largest == 0, 1.0, largest)[..., None],
        jnp.asarray(NF4_CODES, jnp.float32),
    )
    offset = jnp.mean(largest)
    flat = (largest - offset).reshape(-1)
    groups = jnp.pad(flat, (0, -flat.size % SCALES)).reshape(-1, SCALES)
    wide = jnp.max(jnp.abs(groups), axis=-1)
    scales = _nearest(
        groups / jnp.where(wide == 0, 1.0, wide)[:, None],
        decode_dynamic(jnp.arange(256, dtype=jnp.uint8)),
    )
    first, second = split_columns(codes.reshape(outputs, inputs))
    return NF4(
        (first << 4) | second, scales.reshape(-1)[: flat.size].reshape(largest.shape), wide, offset
    )


@jax.jit
def to_int8(matrix: jax.Array) -> Int8Rows:
    """Divide each row by its largest absolute number, and round to steps of 1/127."""
    largest = jnp.max(jnp.abs(matrix), axis=-1)
    scale = jnp.where(largest == 0, 1.0, largest) / 127.0
    return Int8Rows(jnp.round(matrix / scale[:, None]).astype(jnp.int8), scale)


_ROUND = {"nf4": to_nf4, "int8": to_int8}


def _nearest(values: jax.Array, table: jax.Array) -> jax.Array:
    """Return the index of the nearest entry of a sorted table."""
    middles = (table[1:] + table[:-1]) / 2
    method = "compare_all" if len(table) < BLOCK else "scan"
    return jnp.searchsorted(middles, values, method=method).astype(jnp.uint8)
