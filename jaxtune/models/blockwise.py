"""Attention a block of scores at a time, in plain XLA, for every platform, mask and cache.

Shape letters: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, H head size, R = G T rows of one
product; n, m number of blocks of queries and of keys, whose T and S are those of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtune.core.dtypes import precision
from jaxtune.core.platforms import platform
from jaxtune.models.layers import softcap
from jaxtune.models.mask import Mask
from jaxtune.models.remat import ATTENTION, named

BLOCK = 256
_FEW = 16  # queries that look at all keys at once: a loop would cost more than their scores
_NOWHERE = jnp.iinfo(jnp.int32).min
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Form(NamedTuple):
    """What of the computation is no array: the cap on scores, and whether blocks that nobody sees are passed over."""

    cap: float | None
    passes_over: bool


class _Places(NamedTuple):
    """Positions and segments of blocks of tokens."""

    positions: Int[Array, "*n B T"]
    segments: Int[Array, "*n B T"]


def blockwise(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(cap(scale q k^T) + mask) v with a running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1).

    Scores exist for one block of queries and keys at a time, forward and backward; keys and values are not repeated: the G query
    heads of a key/value head are rows of one product. Blocks in which no query sees a key are passed over, whether they lie in the
    future, beyond the window or in other segments. The softmax is in float32. What a query sees nothing with is undefined but finite.
    """
    batch, queries, heads, size = q_BTNH.shape
    keys, kv_heads = k_BSKH.shape[1:3]
    rows, columns = min(BLOCK, queries), keys if queries <= _FEW else min(BLOCK, keys)
    q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(batch, queries, kv_heads, -1, size)
    q_nBKGTH = _blocks(q_BTKGH, rows).transpose(0, 1, 3, 4, 2, 5)
    k_mBKSH, v_mBKSH = (_blocks(part, columns).transpose(0, 1, 3, 2, 4) for part in (k_BSKH, v_BSKH))
    here = _Places(*(_blocks(part, rows, _NOWHERE) for part in (mask.query_positions, mask.query_segments)))
    there = _Places(*(_blocks(part, columns, _NOWHERE + 1) for part in (mask.key_positions, mask.key_segments)))
    form = _Form(cap, k_mBKSH.shape[0] > 1 and platform() != "gpu")  # on a GPU the host would wait for each condition
    q_nBKRH = q_nBKGTH.reshape(*q_nBKGTH.shape[:3], -1, size)
    out_nBKRH = _attention(form, q_nBKRH, k_mBKSH, v_mBKSH, here, there, mask.window)
    out_nBTKGH = out_nBKRH.reshape(q_nBKGTH.shape).transpose(0, 1, 4, 2, 3, 5)
    return jnp.moveaxis(out_nBTKGH, 0, 1).reshape(batch, -1, heads, size)[:, :queries]


def _blocks(part: Any, size: int, fill: int = 0) -> Any:
    """[B, T, ...] cut into blocks along T, the last one filled: [n, B, T, ...]."""
    missing = -part.shape[1] % size
    if missing:
        part = jnp.pad(part, ((0, 0), (0, missing), *((0, 0) for _ in part.shape[2:])), constant_values=fill)
    return jnp.moveaxis(part.reshape(part.shape[0], -1, size, *part.shape[2:]), 1, 0)


def _attention(form, q_nBKRH, k_mBKSH, v_mBKSH, here, there, window):
    return _forward(form, q_nBKRH, k_mBKSH, v_mBKSH, here, there, window)[0]


def _forward(form: _Form, q_nBKRH, k_mBKSH, v_mBKSH, here: _Places, there: _Places, window):
    def rows(_, inputs):
        q_BKRH, at = inputs

        def turn(carry, inputs):
            k_BKSH, v_BKSH, of = inputs
            allowed = Mask(at.positions, of.positions, at.segments, of.segments, window).allowed()

            def look(carry):
                acc, top, total = carry
                scores = _masked(softcap(_scores(q_BKRH, k_BKSH), form.cap), allowed)
                new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
                # One exponential for the sum and the product: fused into the sum it would be computed twice.
                exps = jax.lax.optimization_barrier(jnp.exp(scores - new))
                shrink = jnp.exp(top - new)
                product = _product("BKRS,BKSH->BKRH", exps.astype(q_BKRH.dtype), v_BKSH, jnp.float32)
                return acc * shrink + product, new, total * shrink + jnp.sum(exps, axis=-1, keepdims=True)

            return _unless_masked(form, allowed, look, carry), None

        thin = (*q_BKRH.shape[:-1], 1)
        start = jnp.zeros(q_BKRH.shape, jnp.float32), jnp.full(thin, _LOWEST), jnp.zeros(thin, jnp.float32)
        (acc, top, total), _ = jax.lax.scan(turn, start, (k_mBKSH, v_mBKSH, there))
        total = jnp.where(total == 0, 1.0, total)
        return None, ((acc / total).astype(q_BKRH.dtype), top + jnp.log(total))

    _, (out, normaliser) = jax.lax.scan(rows, None, (q_nBKRH, here))
    out, normaliser = named(out, ATTENTION), named(normaliser, ATTENTION)
    return out, (q_nBKRH, k_mBKSH, v_mBKSH, here, there, window, out, normaliser)


def _backward(form: _Form, residuals, dout_nBKRH):
    """Gradients from recomputed probabilities P: dV = P^T dO, dS = P (dO V^T - rowsum(dO O)) (Dao et al. 2022, appendix B)."""
    q_nBKRH, k_mBKSH, v_mBKSH, here, there, window, out_nBKRH, normaliser = residuals
    wide = dout_nBKRH.astype(jnp.float32) * out_nBKRH.astype(jnp.float32)
    mean = jnp.sum(wide, axis=-1, keepdims=True)

    def rows(sums, inputs):
        q_BKRH, dout_BKRH, at, norm, mean = inputs

        def turn(dq, inputs):
            k_BKSH, v_BKSH, of, dk, dv = inputs
            allowed = Mask(at.positions, of.positions, at.segments, of.segments, window).allowed()

            def look(carry):
                dq, dk, dv = carry
                scores = softcap(_scores(q_BKRH, k_BKSH), form.cap)
                probs = jnp.exp(_masked(scores, allowed) - norm)
                dscores = probs * (_product("BKRH,BKSH->BKRS", dout_BKRH, v_BKSH, jnp.float32) - mean)
                if form.cap is not None:
                    dscores *= 1 - jnp.square(scores / form.cap)
                dscores = dscores.astype(q_BKRH.dtype)
                dv += _product("BKRS,BKRH->BKSH", probs.astype(q_BKRH.dtype), dout_BKRH, jnp.float32)
                dk += _product("BKRS,BKRH->BKSH", dscores, q_BKRH, jnp.float32)
                return dq + _product("BKRS,BKSH->BKRH", dscores, k_BKSH, jnp.float32), dk, dv

            dq, dk, dv = _unless_masked(form, allowed, look, (dq, dk, dv))
            return dq, (dk, dv)

        dq, sums = jax.lax.scan(turn, jnp.zeros(q_BKRH.shape, jnp.float32), (k_mBKSH, v_mBKSH, there, *sums))
        return sums, dq.astype(q_BKRH.dtype)

    start = tuple(jnp.zeros(part.shape, jnp.float32) for part in (k_mBKSH, v_mBKSH))
    (dk, dv), dq = jax.lax.scan(rows, start, (q_nBKRH, dout_nBKRH, here, normaliser, mean))
    return dq, dk.astype(k_mBKSH.dtype), dv.astype(v_mBKSH.dtype), None, None, None


_attention = jax.custom_vjp(_attention, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _unless_masked(form: _Form, allowed: jax.Array, look: Any, carry: Any) -> Any:
    return jax.lax.cond(jnp.any(allowed), look, lambda carry: carry, carry) if form.passes_over else look(carry)


def _scores(q_BKRH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return _product("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, jnp.float32)


def _masked(scores: Float[Array, "B K R S"], allowed: Bool[Array, "B T S"]) -> Float[Array, "B K R S"]:
    batch, kv_heads, rows, keys = scores.shape
    by_head = scores.reshape(batch, kv_heads, rows // allowed.shape[1], allowed.shape[1], keys)
    return jnp.where(allowed[:, None, None], by_head, _LOWEST).reshape(scores.shape)


def _product(equation: str, left: jax.Array, right: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.einsum(equation, left, right, precision=precision(left.dtype), preferred_element_type=dtype)
