"""The leaves of a decoder: linear map, embedding, normalization.

Weights have Hugging Face's names and layout.
"""

import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Key

from jaxtune.core.sharding import constrain, divides_evenly
from jaxtune.models.config import NormConfig
from jaxtune.models.kernels.dot import dot, weight_grad
from jaxtune.models.kernels.quantized import (
    Axes,
    QuantizedTensor,
    quantized_matmul,
    quantized_matmul_back,
)
from jaxtune.models.remat import PROJECTION, named

INIT_STD = 0.02

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return c tanh(x / c), which keeps x within -c and c; x itself where the cap c is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def matmul(
    x: jax.Array, weight: jax.Array | QuantizedTensor, axes: Axes = (None, None)
) -> jax.Array:
    """Return x W^T in x's dtype, W in Hugging Face's layout [out, in]; float32 means float32 on
    every platform.

    Args:
        x: [..., in].
        weight: W.
        axes: logical names of out and in, for a quantized W.

    """
    if isinstance(weight, QuantizedTensor):
        return quantized_matmul(x, weight, axes)
    return _matmul(x, weight)


def matmul_back(
    dy: jax.Array, weight: jax.Array | QuantizedTensor, axes: Axes = (None, None)
) -> jax.Array:
    """Return dy W, the gradient of `matmul` with respect to x."""
    if isinstance(weight, QuantizedTensor):
        return quantized_matmul_back(dy, weight, axes)
    return dot(dy, weight, 0)


def _plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    return dot(x, weight, 1)


def _matmul_fwd(x: Any, weight: Any) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
    """Return the product and what the backward pass needs: x only where the weight trains."""
    return _plain(x.value, weight.value), (x.value if weight.perturbed else None, weight.value)


def _matmul_bwd(
    residuals: tuple[jax.Array | None, jax.Array], dy: Any
) -> tuple[jax.Array | None, jax.Array | None]:
    x, weight = residuals
    if isinstance(dy, SymbolicZero):
        return None, None
    return dot(dy, weight, 0), None if x is None else weight_grad(dy, x).astype(weight.dtype)


_matmul = jax.custom_vjp(_plain)
_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


class Dropout:
    """The random numbers of one forward pass in training: a key for every row, so they do not
    depend on how the batch is split.
    """

    def __init__(self, keys: Key[Array, " batch"]) -> None:
        self.keys = keys

    def fold(self, number: int | jax.Array) -> "Dropout":
        """Return the same rows' keys for the part of the model that has this number."""
        return Dropout(jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys, number))

    def uniform(self, shape: tuple[int, ...], name: str) -> Float[Array, "batch ..."]:
        """Draw an array of this shape for every row, uniform from -1 to 1."""
        keys = self.fold(zlib.crc32(name.encode())).keys
        return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0))(keys)

    def __call__(
        self, x: Float[Array, "batch seq embed"], rate: float, name: str
    ) -> Float[Array, "batch seq embed"]:
        """Zero the entries of x at `rate` and scale the rest by 1 / (1 - rate).

        `name` tells a layer's draws apart.
        """
        keys = self.fold(zlib.crc32(name.encode())).keys
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class Linear(nnx.Module):
    """y = x W^T (+ b), with W of shape [out, in].

    Args:
        axes: logical axis names of W; its sharding and an adapter's follow from them.

    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        *,
        bias: bool,
        dtype: np.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        init = jax.nn.initializers.normal(INIT_STD)
        self.weight = nnx.Param(init(rngs.params(), (outputs, inputs), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype), axes=axes[:1]) if bias else None

    def __call__(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None = None
    ) -> Float[Array, "*batch out"]:
        """Return y; `dropout` is for adapters that wrap the layer."""
        return named(self.product(x), PROJECTION)

    def times_weight(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x W^T."""
        return matmul(x, self.weight[...], self.weight.get_metadata()["axes"])

    def as_head(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return `(h, W)` with y = h W^T, for a head whose product is computed in chunks."""
        return x, self.weight[...]

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x W^T (+ b), unnamed: no remat policy keeps it."""
        y = self.times_weight(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Router(nnx.Module):
    """The scores of a mixture's experts: x W^T.

    As in transformers it is not a `Linear`, so adapters on linear layers leave it alone.
    """

    def __init__(self, inputs: int, experts: int, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        init = jax.nn.initializers.normal(INIT_STD)
        self.weight = nnx.Param(init(rngs.params(), (experts, inputs), dtype), axes=(None, "embed"))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch experts"]:
        """Return the scores before the softmax."""
        return matmul(x, self.weight[...])


class Embedding(nnx.Module):
    """A table [vocab, embed] with a row per token."""

    def __init__(self, vocab: int, embed: int, *, dtype: np.dtype, rngs: nnx.Rngs) -> None:
        init = jax.nn.initializers.normal(INIT_STD)
        self.weight = nnx.Param(init(rngs.params(), (vocab, embed), dtype), axes=("vocab", "embed"))

    def __call__(
        self, tokens: Int[Array, "batch seq"], dtype: np.dtype
    ) -> Float[Array, "batch seq embed"]:
        """Return the tokens' rows in the compute dtype.

        Where the table is sharded over `embed`, each device looks up its part of the rows for all
        devices that share it, so that they exchange rows and not the table.
        """
        if not divides_evenly("batch", tokens.shape[0]):
            return self.weight[...][tokens].astype(dtype)
        tokens = constrain(tokens, "lookup", "seq")
        return constrain(self.weight[...][tokens].astype(dtype), "lookup", "seq", "embed")

    def as_head(
        self, x: Float[Array, "*batch embed"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return `(h, W)` like `Linear.as_head`, for a tied head. An adapter on the embedding does
        not act on the head.
        """
        return x, self.weight[...]


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + w), the mean in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, config: NormConfig, *, dtype: np.dtype) -> None:
        self.weight = nnx.Param(jnp.full((size,), 1.0 - config.offset, dtype), axes=(None,))
        self.config = config

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Return the normalized input in its own dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(
            jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.eps
        )
        weight = self.weight[...]
        if self.config.wide:
            return ((self.config.offset + weight.astype(jnp.float32)) * wide).astype(x.dtype)
        return weight.astype(x.dtype) * wide.astype(x.dtype)
