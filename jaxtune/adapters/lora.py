"""Low-rank adaptation: a layer whose frozen weight has a trainable update of rank r beside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxtune.models.kernels.dot import weight_grad
from jaxtune.models.kernels.quantized import Axes, QuantizedTensor
from jaxtune.models.layers import Dropout, Embedding, Linear, matmul, matmul_back
from jaxtune.models.remat import LOW, PROJECTION, named, named_in_rule


class LoRAParam(nnx.Param):
    """A leaf of an adapter; always float32. It trains unless it says otherwise."""

    @property
    def trains(self) -> bool:
        """Whether it is trained, or only comes with the adapter."""
        return bool(self.get_metadata().get("trained", True))


class LoRAInit(nnx.Variable):
    """A factor as it was when training began, where that is subtracted (see `adapters.pissa`)."""


class LoRAScale(nnx.Variable):
    """What B A is multiplied with, one number a layer; 0 in layers of a stack that are not
    adapted.
    """


@dataclass(frozen=True)
class LoRASpec:
    """The adapter of one leaf.

    Attributes:
        name: what tells its draws of dropout apart from other layers'.
        ranks: r of every layer of the stack, 0 where there is no adapter. The factors are padded
            with zeros to the largest: a padded entry of A meets zeros of B and the other way round,
            so it gets no gradient and stays zero.
        scales: of B A, likewise.
        dropout: rate on the adapter's input in training.

    """

    name: str
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dropout: float

    def scale(self, stack: list[int]) -> LoRAScale:
        """The scales as an array of the stack's shape."""
        return LoRAScale(jnp.asarray(self.scales, jnp.float32).reshape(stack), axes=())

    def within(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Which entries of a factor are not padding."""
        counted = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis)
        return counted < jnp.asarray(self.ranks).reshape(*shape[:-2], 1, 1)


class LoRALinear(Linear):
    """y = x W^T (+ b) + scale (x A^T) B^T      (Hu et al. 2021, eq. 3); A [r, in], B [out, r],
    float32.

    With a magnitude m, each row of W + scale B A is brought to length m (DoRA, Liu et al. 2024, eq.
    5), the row's own length being no part of the gradient, as in its section 4.3 and in PEFT.

    It is the linear layer it replaces, with the same weight at the same path, and the factors
    beside it. A is drawn as PEFT draws it, uniform within 1 / sqrt(in), and B is zero, so that
    training starts from the base.

    Args:
        draw: gives the factor A for a shape and a bound.

    """

    def __init__(
        self,
        base: Linear,
        part: LoRASpec,
        draw: Callable[[tuple[int, ...], float], jax.Array],
        *,
        dora: bool,
    ) -> None:
        self.weight, self.bias, self.part = base.weight, base.bias, part
        *stack, outputs, inputs = base.weight.shape
        axes, rank = base.weight.get_metadata()["axes"], max(part.ranks)
        factor_a = draw((*stack, rank, inputs), 1 / math.sqrt(inputs))
        factor_a = jnp.where(part.within(factor_a.shape, -2), factor_a, 0)
        self.lora_A = LoRAParam(factor_a, axes=("rank", axes[1]))
        self.lora_B = LoRAParam(
            jnp.zeros((*stack, outputs, rank), jnp.float32), axes=(axes[0], "rank")
        )
        self.scale = part.scale(stack)
        lengths = jnp.linalg.norm(base.weight[...].astype(jnp.float32), axis=-1) if dora else None
        self.lora_magnitude_vector = None if lengths is None else LoRAParam(lengths, axes=axes[:1])
        self.start_A: LoRAInit | None = None
        self.start_B: LoRAInit | None = None

    def __call__(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None = None
    ) -> Float[Array, "*batch out"]:
        """The adapted linear map; the adapter's input is dropped out only where `dropout` brings
        keys.
        """
        dropped = self._dropped(x, dropout)
        y = self._plain(x) if dropped is x and self._is_plain else self._composed(x, dropped)
        return named(y if self.bias is None else y + self.bias[...].astype(y.dtype), PROJECTION)

    @property
    def _is_plain(self) -> bool:
        return self.lora_magnitude_vector is None and self.start_A is None

    def _plain(self, x: Float[Array, "*batch in"]) -> Any:
        axes = self.weight.get_metadata()["axes"]
        return adapted_product(
            axes, x, self.weight[...], self.lora_A[...], self._scaled(self.lora_B[...])
        )

    def _composed(self, x: Float[Array, "*batch in"], dropped: Float[Array, "*batch in"]) -> Any:
        y, update = self.times_weight(x), self._update(dropped, x)
        if self.lora_magnitude_vector is None:
            return y + update
        stretch = self._stretch().astype(y.dtype)
        base = y if dropped is x else self.times_weight(dropped)
        return y + (stretch - 1) * base + stretch * update

    def _update(
        self, dropped: Float[Array, "*batch in"], x: Float[Array, "*batch in"]
    ) -> Float[Array, "*batch out"]:
        """The low-rank part of the map, less what it was at the start where that is subtracted
        from the base.
        """
        update = low_rank(dropped, self.lora_A[...], self._scaled(self.lora_B[...]))
        if self.start_A is None or self.start_B is None:
            return update
        return update - low_rank(x, self.start_A[...], self._scaled(self.start_B[...]))

    def as_head(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """See Linear: [x, x A^T] and [W, scale B], so that the update is not rounded into the
        weight.
        """
        low, b = (
            [matmul(self._dropped(x, dropout), self.lora_A[...])],
            [self._scaled(self.lora_B[...])],
        )
        if self.start_A is not None and self.start_B is not None:
            low, b = [*low, matmul(x, self.start_A[...])], [*b, -self._scaled(self.start_B[...])]
        wide = jnp.concatenate([part.astype(x.dtype) for part in (self.weight[...], *b)], axis=-1)
        if self.lora_magnitude_vector is not None:
            wide = wide * self._stretch().astype(x.dtype)[:, None]
        return jnp.concatenate([x, *low], axis=-1), wide

    def _scaled(self, factor: Float[Array, "out rank"]) -> Float[Array, "out rank"]:
        return factor * self.scale[...].astype(factor.dtype)

    def _dropped(self, x: jax.Array, dropout: Dropout | None) -> jax.Array:
        return (
            x
            if dropout is None or not self.part.dropout
            else dropout(x, self.part.dropout, self.part.name)
        )

    def _stretch(self) -> Float[Array, " out"]:
        """By how much DoRA stretches each row; 1 where the layer has no adapter."""
        assert self.lora_magnitude_vector is not None
        scale = self.scale[...]
        update = scale * jnp.matmul(
            self.lora_B[...], self.lora_A[...], precision=jax.lax.Precision.HIGHEST
        )
        length = jnp.linalg.norm(self.weight[...].astype(jnp.float32) + update, axis=-1)
        return jnp.where(
            scale != 0, self.lora_magnitude_vector[...] / jax.lax.stop_gradient(length), 1.0
        )


class LoRAEmbedding(Embedding):
    """One row of W + scale (B A)^T per token; A [r, vocab], zero at first, B [embed, r], normal,
    as PEFT has them.
    """

    def __init__(self, base: Embedding, part: LoRASpec, key: jax.Array) -> None:
        self.weight, self.part = base.weight, part
        vocab, embed = base.weight.shape
        axes, rank = base.weight.get_metadata()["axes"], part.ranks[0]
        self.lora_embedding_A = LoRAParam(
            jnp.zeros((rank, vocab), jnp.float32), axes=("rank", axes[0])
        )
        self.lora_embedding_B = LoRAParam(
            jax.random.normal(key, (embed, rank), jnp.float32), axes=(axes[1], "rank")
        )
        self.scale = part.scale([])

    def __call__(
        self, tokens: Int[Array, "batch seq"], dtype: np.dtype
    ) -> Float[Array, "batch seq embed"]:
        """The tokens' rows in the compute dtype."""
        low = self.lora_embedding_A[...].T[tokens].astype(dtype)
        return super().__call__(tokens, dtype) + matmul(
            low, self.lora_embedding_B[...] * self.scale[...]
        )


@jax.custom_vjp
def low_rank(
    x: Float[Array, "*batch in"], a: Float[Array, "rank in"], b: Float[Array, "out rank"]
) -> Float[Array, "*batch out"]:
    """(x A^T) B^T, the products in x's dtype, the gradients of A and B in float32.

    The backward pass is written out so that the gradient of B is a product with the thin side
    transposed; derived, it would transpose the gradient of the output, the widest array of the
    layer.
    """
    return matmul(matmul(x, a), b)


def _low_rank_fwd(x, a, b):
    low = named_in_rule(matmul(x, a), LOW)
    return matmul(low, b), (x, low, a, b)


def _low_rank_bwd(residuals, dy):
    dlow, da, db = _factors_back(residuals, dy)
    return matmul_back(dlow, residuals[2]), da, db


def _factors_back(
    residuals: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, low, _, b = residuals
    dlow = matmul_back(dy, b)
    # The barrier keeps the thin side first; XLA would fold the transposition into the product,
    # which on CPU is then far slower.
    return dlow, weight_grad(dlow, x), jax.lax.optimization_barrier(weight_grad(low, dy)).T


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted_product(
    axes: Axes,
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"] | QuantizedTensor,
    a: Float[Array, "rank in"],
    b: Float[Array, "out rank"],
) -> Float[Array, "*batch out"]:
    """X W^T + (x A^T) B^T with a frozen W of logical `axes`.

    The backward pass is through with x before it makes x's gradient, so that these two, which may
    be the widest arrays of a layer, are not there at the same time.
    """
    return matmul(x, weight, axes) + low_rank(x, a, b)


def _adapted_fwd(axes, x, weight, a, b):
    update, residuals = _low_rank_fwd(x, a, b)
    return matmul(x, weight, axes) + update, (weight, *residuals)


def _adapted_bwd(axes, residuals, dy):
    weight, *rest = residuals
    dlow, da, db = _factors_back(tuple(rest), dy)
    dlow, da, dy = jax.lax.optimization_barrier((dlow, da, dy))
    return matmul_back(dy, weight, axes) + matmul_back(dlow, rest[2]), None, da, db


adapted_product.defvjp(_adapted_fwd, _adapted_bwd)
