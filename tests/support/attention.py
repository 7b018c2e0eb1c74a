"""Attention by its formula, and rows of several texts to compute it on."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.kernels.mask import Mask

SCALE = 0.2


def packed(window=None, tokens=256):
    """Two rows of three texts, the borders of which lie within blocks."""
    lengths = [[100, 60, tokens - 160], [30, 200, tokens - 230]]
    segments = np.asarray([np.repeat([1, 2, 3], row) for row in lengths], np.int32)
    positions = np.asarray(
        [np.concatenate([np.arange(size) for size in row]) for row in lengths], np.int32
    )
    limit = None if window is None else np.int32(window)
    return Mask(positions, positions, segments, segments, limit)


def arrays(size, dtype, tokens=256, heads=4, kv_heads=2):
    """Queries, keys, values and the output's gradient of two rows."""
    random = np.random.default_rng(0)
    counts = (heads, kv_heads, kv_heads, heads)
    sizes = [(2, tokens, count, size) for count in counts]
    return [jnp.asarray(random.normal(size=size), jnp.float32).astype(dtype) for size in sizes]


def visible(mask):
    """Pair by pair: the same text, not later, and within the window."""
    places = zip(*(np.asarray(part) for part in mask[:4]), strict=True)
    window = np.inf if mask.window is None else int(mask.window)
    return np.asarray(
        [
            [
                [
                    one == other and 0 <= at - of < window
                    for of, other in zip(keys, key_segments, strict=True)
                ]
                for at, one in zip(queries, query_segments, strict=True)
            ]
            for queries, keys, query_segments, key_segments in places
        ]
    )


def formula(q, k, v, mask, cap=None):
    """softmax(cap(scale q k^T) + mask) v in float32."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (
        part.astype(jnp.float32) for part in (q, jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2))
    )
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * SCALE
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    probs = jax.nn.softmax(jnp.where(visible(mask)[:, None], scores, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", probs, v, precision="highest")
