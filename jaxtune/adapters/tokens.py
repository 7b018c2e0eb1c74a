"""Rows of single tokens that an adapter has for itself, in the embedding and in the head; the
rest of the matrix stays as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxtune.adapters.lora import LoRAParam
from jaxtune.models.layers import Dropout, Embedding, Linear


def _rows(weight: nnx.Param, ids: tuple[int, ...], trains: bool) -> LoRAParam:
    rows = weight[...][jnp.asarray(ids)].astype(jnp.float32)
    return LoRAParam(rows, axes=(None, weight.get_metadata()["axes"][1]), trained=trains)


def _as_head(
    x: jax.Array, weight: nnx.Param, ids: tuple[int, ...], rows: LoRAParam
) -> tuple[jax.Array, jax.Array]:
    return x, weight[...].astype(x.dtype).at[jnp.asarray(ids)].set(rows[...].astype(x.dtype))


class TokenEmbedding(Embedding):
    """An embedding in which the tokens `ids` have rows of the adapter (PEFT's trainable tokens)."""

    def __init__(self, base: Embedding, ids: tuple[int, ...], *, trains: bool) -> None:
        self.weight, self.ids = base.weight, ids
        self.trainable_tokens_delta = _rows(base.weight, ids, trains)

    def __call__(
        self, tokens: Int[Array, "batch seq"], dtype: np.dtype
    ) -> Float[Array, "batch seq embed"]:
        """The tokens' rows in the compute dtype."""
        hits = tokens[..., None] == jnp.asarray(self.ids)
        own = self.trainable_tokens_delta[...][jnp.argmax(hits, axis=-1)].astype(dtype)
        return jnp.where(hits.any(axis=-1, keepdims=True), own, super().__call__(tokens, dtype))

    def as_head(
        self, x: Float[Array, "*batch embed"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """See Linear: where the head is tied it has the same rows."""
        return _as_head(x, self.weight, self.ids, self.trainable_tokens_delta)


class TokenLinear(Linear):
    """A head in which the tokens `ids` have rows of the adapter."""

    def __init__(self, base: Linear, ids: tuple[int, ...], *, trains: bool) -> None:
        self.weight, self.bias, self.ids = base.weight, base.bias, ids
        self.trainable_tokens_delta = _rows(base.weight, ids, trains)

    def as_head(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """See Linear."""
        return _as_head(x, self.weight, self.ids, self.trainable_tokens_delta)
