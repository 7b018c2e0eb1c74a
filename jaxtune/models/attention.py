"""Grouped-query attention over packed segments or over a cache; the one place where its kernel is chosen.

Shape letters: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, H head size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Mask(NamedTuple):
    """Which key a query may see: one of its own segment at its own position or before.

    Rotary positions serve as the order, so a packed row needs no other information than its segments and positions.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]

    def allowed(self) -> Bool[Array, "B T S"]:
        """The mask as booleans."""
        causal = self.key_positions[:, None, :] <= self.query_positions[:, :, None]
        return causal & (self.key_segments[:, None, :] == self.query_segments[:, :, None])


def attend(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H) + mask) v, the softmax in float32 (Vaswani et al. 2017; grouped: Ainslie et al. 2023)."""
    batch, queries, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    precision = jax.lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
    q_BTKGH = q_BTNH.reshape(batch, queries, kv_heads, heads // kv_heads, size) * jnp.asarray(1 / math.sqrt(size), q_BTNH.dtype)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(mask.allowed()[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BTNH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH, precision=precision)
    return out.reshape(batch, queries, heads, size)
