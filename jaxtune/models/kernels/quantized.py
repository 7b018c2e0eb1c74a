"""Quantized frozen matrices: their layout in memory, their values, and products with them.

They are dequantized where they are used, one layer at a time within the scan; the backward pass
dequantizes again instead of keeping the wide matrix.
"""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, UInt8

from jaxtune.core.hardware import platform
from jaxtune.core.sharding import RULES, constrain
from jaxtune.models.kernels.dot import dot

BLOCK, SCALES = 64, 256
"""Numbers that share a scale in NF4, and scales that share one of their own (Dettmers et al.
2023, section 3).
"""

NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (Dettmers et al.
2023, appendix E).
"""

_DECADES = 7

Axes = tuple[str | None, ...]
GATHERED = replace(RULES, embed=None)
"""How a matrix is sharded while it is used."""


class QuantizedTensor:
    """A quantized matrix [..., out, in]. Like an array it has a shape and can be converted to
    another dtype.
    """

    shape: Any

    @property
    def ndim(self) -> int:
        """Return the number of dimensions, those of stacked layers included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of values it represents."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        if index is not Ellipsis:
            raise TypeError("A quantized matrix cannot be indexed. Convert it with astype first.")
        return self

    @abstractmethod
    def astype(self, dtype: Any) -> Float[Array, "*stack out in"]:
        """Dequantize the matrix."""

    @abstractmethod
    def gather(self, axes: Axes) -> Self:
        """Gather the codes over the mesh axes that shard the matrix in storage only; `axes` are the
        logical names of out and in.
        """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4(QuantizedTensor):
    """Four bits per number: W = code * scale of its block of 64 in the row. With the scales, which
    have eight bits, it is 4.127 bits per number.

    Attributes:
        codes: two numbers per byte: of each block, the first half is in the upper bits and the
            second in the lower.
        scales: a block's largest absolute value, as an index of the dynamic map; see
            `decode_dynamic`.
        wide: the factor of the map's values, one for every 256 scales of a matrix in the order of
            its rows.
        offset: added to the scales of a matrix.

    """

    codes: UInt8[Array, "*stack out half"]
    scales: UInt8[Array, "*stack out blocks"]
    wide: Float32[Array, "*stack groups"]
    offset: Float32[Array, "*stack"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that it stands for."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def astype(self, dtype: Any) -> Float[Array, "*stack out in"]:
        """Dequantize the matrix."""
        return join_columns(*self.dequantize_halves(dtype))

    def gather(self, axes: Axes) -> "NF4":
        """Gather codes and scales; see `QuantizedTensor`."""
        codes, scales = (
            constrain(part, *axes, rules=GATHERED) for part in (self.codes, self.scales)
        )
        return NF4(codes, scales, self.wide, self.offset)

    def dequantize_halves(
        self, dtype: Any
    ) -> tuple[Float[Array, "*stack out half"], Float[Array, "*stack out half"]]:
        """Dequantize the first numbers of all bytes and the second ones, apart: interleaving them
        would copy the matrix.
        """
        blocks, stack = self.scales.shape, self.scales.shape[:-2]
        groups = jnp.repeat(self.wide, SCALES, axis=-1)[..., : blocks[-2] * blocks[-1]].reshape(
            blocks
        )
        scale = decode_dynamic(self.scales) * groups + self.offset.reshape(*stack, 1, 1)
        # A one that the compiler does not know: otherwise it would keep every number of the code
        # book as an array of the matrix's size.
        unit = jnp.where(self.offset == self.offset, 1.0, 0.0).reshape(*stack, 1, 1)
        repeated = _repeat_scales(scale, BLOCK // 2)
        first, second = (
            (decode_nf4(part, unit) * repeated).astype(dtype)
            for part in (self.codes >> 4, self.codes & 15)
        )
        return first, second


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Rows(QuantizedTensor):
    """Eight bits per number: W = code * scale of its row.

    The scale is the row's largest absolute value over 127.

    Attributes:
        codes: integers from -127 to 127.
        scales: one per row.
        integer: whether products are computed between integers, the other factor being rounded to
            eight bits with a scale per token (Dettmers et al. 2022, LLM.int8(), without its
            outliers).

    """

    codes: Int8[Array, "*stack out in"]
    scales: Float32[Array, "*stack out"]
    integer: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that it stands for."""
        return tuple(self.codes.shape)

    def astype(self, dtype: Any) -> Float[Array, "*stack out in"]:
        """Dequantize the matrix."""
        return (self.codes.astype(jnp.float32) * self.scales[..., None]).astype(dtype)

    def gather(self, axes: Axes) -> "Int8Rows":
        """Gather codes and scales; see `QuantizedTensor`."""
        codes, scales = (
            constrain(self.codes, *axes, rules=GATHERED),
            constrain(self.scales, axes[0], rules=GATHERED),
        )
        return replace(self, codes=codes, scales=scales)

    def multiply(self, x: Float[Array, "*batch size"], axis: int) -> Float[Array, "*batch other"]:
        """Contract x's last axis with an axis of the codes, in x's dtype."""
        if not self.integer:
            return dot(x, self.codes, axis)
        step = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True) / 127
        rounded = jnp.round(x.astype(jnp.float32) / jnp.where(step == 0, 1.0, step)).astype(
            jnp.int8
        )
        dims = (((x.ndim - 1,), (axis,)), ((), ()))
        product = jax.lax.dot_general(rounded, self.codes, dims, preferred_element_type=jnp.int32)
        return (product.astype(jnp.float32) * step).astype(x.dtype)


def decode_nf4(
    codes: UInt8[Array, "*shape"], unit: float | Float[Array, "..."] = 1.0
) -> Float32[Array, "*shape"]:
    """Return the number of each code, by a tree of selects over its bits: on TPU a table lookup
    moves 280 times the bytes.

    Args:
        codes: 0 to 15.
        unit: 1, the factor of all numbers.

    """
    level = [jnp.float32(value) * unit for value in NF4_CODES]
    for bit in range(4):
        upper = (codes & (1 << bit)) != 0
        level = [
            jnp.where(upper, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def split_columns(
    x: Float[Array, "*batch in"],
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """Split columns into those that meet the first numbers of the bytes and those that meet the
    second.
    """
    first, second = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, 2, BLOCK // 2), -2, 0)
    return first.reshape(*x.shape[:-1], -1), second.reshape(*x.shape[:-1], -1)


def join_columns(
    first: Float[Array, "*batch half"], second: Float[Array, "*batch half"]
) -> Float[Array, "*batch in"]:
    """Undo `split_columns`."""
    parts = [part.reshape(*part.shape[:-1], -1, BLOCK // 2) for part in (first, second)]
    return jnp.stack(parts, axis=-2).reshape(*first.shape[:-1], 2 * first.shape[-1])


def _repeat_scales(
    scale: Float32[Array, "*stack out blocks"], times: int
) -> Float32[Array, "*stack out half"]:
    """Repeat each scale. On TPU this is a product with zeros and ones: repeating along the lanes
    would make XLA transpose the codes.
    """
    if platform() != "tpu":
        return jnp.repeat(scale, times, axis=-1)
    ones = jnp.repeat(jnp.eye(scale.shape[-1], dtype=jnp.float32), times, axis=-1)
    return jnp.matmul(scale, ones, precision=jax.lax.Precision.HIGHEST)


def decode_dynamic(codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Return the value at an index of the sorted dynamic map (Dettmers et al. 2022, 8-bit
    optimizers, section 2.1).

    Index 127 is zero and 255 is one. At a distance j from 127 the absolute value is
    10^(d - 6) (0.1 + 0.9 (j - 2^d + 1/2) / 2^d) with d = floor(log2 j).
    """
    signed = codes.astype(jnp.int32) - 127
    distance = jnp.abs(signed)
    absolute = jnp.zeros(codes.shape, jnp.float32)
    for decade in range(_DECADES):
        within = (distance - 2**decade).astype(jnp.float32) + 0.5
        value = jnp.float32(10.0 ** (decade - 6)) * (0.1 + within * jnp.float32(0.9 / 2**decade))
        absolute = jnp.where(distance >= 2**decade, value, absolute)
    return jnp.where(codes == 255, 1.0, jnp.where(signed < 0, -absolute, absolute))


def with_integer_products(tree: Any) -> Any:
    """Return a tree whose eight-bit matrices are multiplied as integers."""

    def use_integers(leaf: Any) -> Any:
        return replace(leaf, integer=True) if isinstance(leaf, Int8Rows) else leaf

    return jax.tree.map(use_integers, tree, is_leaf=lambda leaf: isinstance(leaf, Int8Rows))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_matmul(
    x: Float[Array, "*batch in"], weight: QuantizedTensor, axes: Axes
) -> Float[Array, "*batch out"]:
    """Return x W^T in x's dtype; `axes` are the logical names of W's out and in."""
    return _forward(x, weight, axes)[0]


def quantized_matmul_back(
    dy: Float[Array, "*batch out"], stored: QuantizedTensor, axes: Axes
) -> Float[Array, "*batch in"]:
    """Return dy W, the gradient of `quantized_matmul` with respect to x."""
    weight = stored.gather(axes)
    if isinstance(weight, Int8Rows):
        return weight.multiply(dy * weight.scales.astype(dy.dtype), 0)
    return dot(_shard_like(dy, axes[0]), weight.astype(dy.dtype), 0)


def _forward(
    x: jax.Array, stored: QuantizedTensor, axes: Axes
) -> tuple[jax.Array, QuantizedTensor]:
    weight = stored.gather(axes)
    if isinstance(weight, Int8Rows):
        return weight.multiply(x, 1) * weight.scales.astype(x.dtype), stored
    if isinstance(weight, NF4):
        first, second = weight.dequantize_halves(x.dtype)
        low, high = (_shard_like(half, axes[1]) for half in split_columns(x))
        return dot(low, first, 1) + dot(high, second, 1), stored
    return dot(x, weight.astype(x.dtype), 1), stored


def _backward(axes: Axes, stored: QuantizedTensor, dy: jax.Array) -> tuple[jax.Array, None]:
    return quantized_matmul_back(dy, stored, axes), None


def _shard_like(
    x: Float[Array, "batch seq size"], axis: str | None
) -> Float[Array, "batch seq size"]:
    """Shard an activation like the axis of the matrix that it meets; otherwise the compiler would
    gather the matrix.
    """
    return constrain(x, "batch", "seq", axis, rules=GATHERED) if x.ndim == 3 else x


quantized_matmul.defvjp(_forward, _backward)
