"""Low-rank adaptation: a linear layer whose frozen weight has a trainable update of rank r beside it."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxtune.models.layers import Dropout, Linear, matmul


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
        y = super().__call__(x)
        if dropout is not None and self.config.dropout:
            x = dropout(x, self.config.dropout, self.name)
        low = matmul(x, self.lora_A[...]) * jnp.asarray(self.config.scale, x.dtype)
        return y + matmul(low, self.lora_B[...])
