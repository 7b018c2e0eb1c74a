"""The key/value cache of generation: slot s of a row holds position s, so ragged rows need no padding on the left."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtune.models.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer (or, with a leading axis, of all)."""

    keys: Float[Array, "*layers batch slots kv_heads head_dim"]
    values: Float[Array, "*layers batch slots kv_heads head_dim"]

    def write(self, keys: jax.Array, values: jax.Array, positions: Int[Array, "batch seq"]) -> "LayerCache":
        """The cache with new keys and values at their positions; what an earlier, longer pass left there is replaced."""
        rows = jnp.arange(keys.shape[0])[:, None]
        return LayerCache(
            self.keys.at[rows, positions].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[rows, positions].set(values.astype(self.values.dtype), mode="drop"),
        )


def make_cache(config: ModelConfig, batch: int, slots: int, dtype: np.dtype) -> LayerCache:
    """An empty cache for all layers.

    Args:
        config: the model's shape.
        batch: rows.
        slots: positions per row, prompt and generated tokens together.
        dtype: storage of keys and values, the model's compute dtype.
    """
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
