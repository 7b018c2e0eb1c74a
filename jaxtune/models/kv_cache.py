"""The key/value cache of generation: slot s of a row holds position s, so rows of different lengths
need no padding on the left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtune.core.sharding import constrain
from jaxtune.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of all layers."""

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]

    def write(
        self,
        layer: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        positions: Int[Array, "batch seq"],
    ) -> "KVCache":
        """Write a layer's new keys and values at their positions; padding, whose position is
        negative, is not kept.
        """
        # Padding goes out of bounds, where it is dropped.
        positions = jnp.where(positions < 0, self.keys.shape[2], positions)
        index = (layer, jnp.arange(keys.shape[0])[:, None], positions)
        written = (
            self.keys.at[index].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[index].set(values.astype(self.values.dtype), mode="drop"),
        )
        return KVCache(
            *(constrain(part, None, "batch", None, "act_heads", None) for part in written)
        )

    def repeat(self, batch: int) -> "KVCache":
        """Repeat the cache of one row for `batch` rows that continue it."""
        return KVCache(
            *(jnp.broadcast_to(part, (part.shape[0], batch, *part.shape[2:])) for part in self)
        )


def make_kv_cache(config: ModelConfig, batch: int, slots: int, dtype: np.dtype) -> KVCache:
    """Make an empty cache for all layers.

    Args:
        config: the model's shape.
        batch: rows.
        slots: positions per row, prompt and generated tokens together.
        dtype: storage of keys and values: the model's compute dtype.

    """
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
