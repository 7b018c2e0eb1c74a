"""Low-rank adaptation: a linear layer whose frozen weight has a trainable update of rank r beside it."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxtune.core.dtypes import precision
from jaxtune.models.layers import Dropout, Linear, matmul
from jaxtune.models.remat import LOW, PROJECTION


class LoRAParam(nnx.Param):
    """A trainable leaf of an adapter; always float32."""


@dataclass(frozen=True)
class LoRAConfig:
    """The numbers of an adapter.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with `rslora` (Kalajdzievski 2023).
        dropout: rate on the adapter's input in training.
        rslora: see alpha.

    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(Linear):
    """y = x W^T (+ b) + scale (x A^T) B^T      (Hu et al. 2021, eq. 3); A [r, in], B [out, r], float32.

    It is the linear layer it replaces, with the same weight at the same path, and the two factors beside it.
    A is drawn as PEFT draws it, uniform within 1 / sqrt(in), and B is zero, so that training starts from the base.
    """

    def __init__(self, base: Linear, name: str, config: LoRAConfig, key: jax.Array) -> None:
        self.weight, self.bias, self.name, self.config = base.weight, base.bias, name, config
        *stack, outputs, inputs = base.weight.shape
        axes = base.weight.get_metadata()["axes"]
        bound = 1 / math.sqrt(inputs)
        factor_a = jax.random.uniform(key, (*stack, config.rank, inputs), jnp.float32, -bound, bound)
        self.lora_A = LoRAParam(factor_a, axes=("rank", axes[1]))
        self.lora_B = LoRAParam(jnp.zeros((*stack, outputs, config.rank), jnp.float32), axes=(axes[0], "rank"))

    def __call__(self, x: Float[Array, "*batch in"], dropout: Dropout | None = None) -> Float[Array, "*batch out"]:
        """The adapted linear map; the adapter's input is dropped out only where `dropout` brings keys."""
        y = self.product(x)
        if dropout is not None and self.config.dropout:
            x = dropout(x, self.config.dropout, self.name)
        update = low_rank(x.reshape(-1, x.shape[-1]), self.lora_A[...], self.lora_B[...] * self.config.scale)
        return checkpoint_name(y + update.reshape(y.shape), PROJECTION)


@jax.custom_vjp
def low_rank(x: Float[Array, "tokens in"], a: Float[Array, "rank in"], b: Float[Array, "out rank"]) -> Float[Array, "tokens out"]:
    """(x A^T) B^T, the products in x's dtype, the gradients of A and B in float32.

    The backward pass is written out so that the gradient of B is a product with the thin side transposed; derived, it would
    transpose the gradient of the output, the widest array of the layer.
    """
    return matmul(matmul(x, a), b)


def _low_rank_fwd(x, a, b):
    low = checkpoint_name(matmul(x, a), LOW)
    return matmul(low, b), (x, low, a, b)


def _low_rank_bwd(residuals, dy):
    x, low, a, b = residuals
    dlow = matmul(dy, b.T)
    return matmul(dlow, a.T), _over_tokens(dlow, x), _over_tokens(low, dy).T


def _over_tokens(thin: Float[Array, "tokens rank"], wide: Float[Array, "tokens size"]) -> Float[Array, "rank size"]:
    return jax.lax.dot_general(
        thin, wide, (((0,), (0,)), ((), ())), precision=precision(thin.dtype), preferred_element_type=jnp.float32
    )


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)
