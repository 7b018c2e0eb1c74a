"""Attention one block of scores at a time, in plain XLA, for every platform, mask and cache.

Shape letters: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, H
head size; n, m number of blocks of queries and of keys, whose T and S are those of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtune.core.dtypes import precision
from jaxtune.core.hardware import platform
from jaxtune.models.kernels.mask import Mask
from jaxtune.models.layers import softcap
from jaxtune.models.remat import ATTENTION, named_in_rule

BLOCK = 256
_FEW = 16  # this many queries see all keys at once: a loop would cost more than their scores
_NOWHERE = jnp.iinfo(jnp.int32).min
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Form(NamedTuple):
    """The static part of the computation: the cap on scores, and whether blocks in which no query
    sees a key are skipped.
    """

    cap: float | None
    skips_masked: bool


class _Tokens(NamedTuple):
    """Positions and segments of blocks of tokens."""

    positions: Int[Array, "*n B T"]
    segments: Int[Array, "*n B T"]


class _Blocks(NamedTuple):
    """Which query sees which key, by blocks of both."""

    queries: _Tokens
    keys: _Tokens
    window: Int[Array, ""] | None


def attend_blockwise(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(cap(scale q k^T) + mask) v with a running maximum and sum (Milakov &
    Gimelshein 2018; Dao et al. 2022, algorithm 1).

    Scores exist for one block of queries and keys at a time, forward and backward. Keys and values
    are not repeated: the G query heads of a key/value head are rows of one product. Blocks in which
    no query sees a key are skipped, whether they lie in the future, beyond the window or in other
    segments. The softmax is in float32. The output of a query that sees no key is undefined but
    finite.
    """
    batch, queries, heads, size = q_BTNH.shape
    keys, kv_heads = k_BSKH.shape[1:3]
    rows, columns = min(BLOCK, queries), keys if queries <= _FEW else min(BLOCK, keys)
    q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(
        batch, queries, kv_heads, -1, size
    )
    q_nBKGTH = _split_blocks(q_BTKGH, rows).transpose(0, 1, 3, 4, 2, 5)
    k_mBKSH, v_mBKSH = (
        _split_blocks(part, columns).transpose(0, 1, 3, 2, 4) for part in (k_BSKH, v_BSKH)
    )
    queries_at = _Tokens(
        *(
            _split_blocks(part, rows, _NOWHERE)
            for part in (mask.query_positions, mask.query_segments)
        )
    )
    keys_at = _Tokens(
        *(
            _split_blocks(part, columns, _NOWHERE + 1)
            for part in (mask.key_positions, mask.key_segments)
        )
    )
    # On a GPU the host would wait for each condition.
    form = _Form(cap, skips_masked=k_mBKSH.shape[0] > 1 and platform() != "gpu")
    blocks = _Blocks(queries_at, keys_at, mask.window)
    out_nBKGTH = _attention(form, q_nBKGTH, k_mBKSH, v_mBKSH, blocks)
    out_nBTKGH = out_nBKGTH.transpose(0, 1, 4, 2, 3, 5)
    return jnp.moveaxis(out_nBTKGH, 0, 1).reshape(batch, -1, heads, size)[:, :queries]


def _split_blocks(part: Any, size: int, fill: int = 0) -> Any:
    """Split [B, T, ...] into blocks along T, the last one padded: [n, B, T, ...]."""
    missing = -part.shape[1] % size
    if missing:
        part = jnp.pad(
            part, ((0, 0), (0, missing), *((0, 0) for _ in part.shape[2:])), constant_values=fill
        )
    return jnp.moveaxis(part.reshape(part.shape[0], -1, size, *part.shape[2:]), 1, 0)


def _attention(form, q_nBKGTH, k_mBKSH, v_mBKSH, blocks):
    return _forward(form, q_nBKGTH, k_mBKSH, v_mBKSH, blocks)[0]


def _forward(form: _Form, q_nBKGTH, k_mBKSH, v_mBKSH, blocks: _Blocks):
    def attend_rows(_, inputs):
        q_BKGTH, q_at = inputs

        def add_block(carry, inputs):
            k_BKSH, v_BKSH, k_at = inputs
            allowed_BTS = Mask(
                q_at.positions, k_at.positions, q_at.segments, k_at.segments, blocks.window
            ).allowed()
            allowed_BTS = _bind(allowed_BTS, k_BKSH)

            def add_scores(carry):
                acc, top, total = carry
                scores = softcap(_product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH), form.cap)
                scores = jnp.where(allowed_BTS[:, None, None], scores, _LOWEST)
                new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
                # One exponential for the sum and the product: fused into the sum it would be
                # computed twice.
                exps = jax.lax.optimization_barrier(jnp.exp(scores - new))
                shrink = jnp.exp(top - new)
                product = _product("BKGTS,BKSH->BKGTH", exps.astype(q_BKGTH.dtype), v_BKSH)
                return (
                    acc * shrink + product,
                    new,
                    total * shrink + jnp.sum(exps, axis=-1, keepdims=True),
                )

            return _unless_masked(form, allowed_BTS, add_scores, carry), None

        thin = (*q_BKGTH.shape[:-1], 1)
        start = (
            jnp.zeros(q_BKGTH.shape, jnp.float32),
            jnp.full(thin, _LOWEST),
            jnp.zeros(thin, jnp.float32),
        )
        (acc, top, total), _ = jax.lax.scan(add_block, start, (k_mBKSH, v_mBKSH, blocks.keys))
        total = jnp.where(total == 0, 1.0, total)
        return None, ((acc / total).astype(q_BKGTH.dtype), (top + jnp.log(total))[..., 0])

    _, (out, normalizer) = jax.lax.scan(attend_rows, None, (q_nBKGTH, blocks.queries))
    out, normalizer = named_in_rule(out, ATTENTION), named_in_rule(normalizer, ATTENTION)
    return out, (q_nBKGTH, k_mBKSH, v_mBKSH, blocks, out, normalizer)


def _backward(form: _Form, residuals, dout_nBKGTH):
    """Return the gradients from recomputed probabilities P: dV = P^T dO,
    dS = P (dO V^T - rowsum(dO O)) (Dao et al. 2022, appendix B).

    Scores are computed with the keys first: two of the three products that use them then have the
    form that XLA is fastest at on CPU.
    """
    q_nBKGTH, k_mBKSH, v_mBKSH, blocks, out_nBKGTH, norm_nBKGT = residuals
    mean_nBKGT = jnp.sum(dout_nBKGTH.astype(jnp.float32) * out_nBKGTH.astype(jnp.float32), axis=-1)

    def backward_rows(sums, inputs):
        q_BKGTH, dout_BKGTH, q_at, norm_BKGT, mean_BKGT = inputs

        def add_block(dq_BKHGT, inputs):
            k_BKSH, v_BKSH, k_at, dk, dv = inputs
            allowed_BTS = Mask(
                q_at.positions, k_at.positions, q_at.segments, k_at.segments, blocks.window
            ).allowed()
            allowed_BST = _bind(jnp.swapaxes(allowed_BTS, 1, 2), k_BKSH)

            def add_scores(carry):
                dq_BKHGT, dk, dv = carry
                scores = softcap(_product("BKSH,BKGTH->BKSGT", k_BKSH, q_BKGTH), form.cap)
                masked = jnp.where(allowed_BST[:, None, :, None], scores, _LOWEST)
                probs = jnp.exp(masked - norm_BKGT[:, :, None])
                dscores = probs * (
                    _product("BKSH,BKGTH->BKSGT", v_BKSH, dout_BKGTH) - mean_BKGT[:, :, None]
                )
                if form.cap is not None:
                    dscores *= 1 - jnp.square(scores / form.cap)
                dscores = dscores.astype(q_BKGTH.dtype)
                dv += _product("BKSGT,BKGTH->BKSH", probs.astype(q_BKGTH.dtype), dout_BKGTH)
                dk += _product("BKSGT,BKGTH->BKSH", dscores, q_BKGTH)
                return dq_BKHGT + _product("BKSH,BKSGT->BKHGT", k_BKSH, dscores), dk, dv

            dq_BKHGT, dk, dv = _unless_masked(form, allowed_BST, add_scores, (dq_BKHGT, dk, dv))
            return dq_BKHGT, (dk, dv)

        start = jnp.zeros_like(jnp.moveaxis(q_BKGTH, -1, 2), jnp.float32)
        dq_BKHGT, sums = jax.lax.scan(add_block, start, (k_mBKSH, v_mBKSH, blocks.keys, *sums))
        # Without the barrier the transposition would become part of the product, which would then
        # have the slow form.
        return sums, jnp.moveaxis(jax.lax.optimization_barrier(dq_BKHGT), 2, -1).astype(
            q_BKGTH.dtype
        )

    start = tuple(jnp.zeros(part.shape, jnp.float32) for part in (k_mBKSH, v_mBKSH))
    (dk, dv), dq = jax.lax.scan(
        backward_rows, start, (q_nBKGTH, dout_nBKGTH, blocks.queries, norm_nBKGT, mean_nBKGT)
    )
    return dq, dk.astype(k_mBKSH.dtype), dv.astype(v_mBKSH.dtype), None


_attention = jax.custom_vjp(_attention, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _unless_masked(form: _Form, allowed: jax.Array, add: Any, carry: Any) -> Any:
    if form.skips_masked:
        return jax.lax.cond(jnp.any(allowed), add, lambda carry: carry, carry)
    return add(carry)


def _bind(allowed: Bool[Array, "B _ _"], k_BKSH: jax.Array) -> Bool[Array, "B _ _"]:
    """Return the mask, bound to what a layer computes; otherwise XLA would expand it over the heads
    once for all layers, and each layer would read the expanded one.
    """
    return jax.lax.optimization_barrier((allowed, k_BKSH))[0]


def _product(equation: str, left: jax.Array, right: jax.Array) -> Float[Array, "B K ..."]:
    """Compute an einsum in float32, with G and T merged into one axis R: with two axes XLA has no
    fast code for it.
    """
    first, second, out = equation.replace("->", ",").split(",")
    split = (left if "GT" in first else right).shape[max(first.find("GT"), second.find("GT")) :][:2]
    parts = (
        part.reshape(_merged(term, part.shape)) for term, part in ((first, left), (second, right))
    )
    product = jnp.einsum(
        equation.replace("GT", "R"),
        *parts,
        precision=precision(left.dtype),
        preferred_element_type=jnp.float32,
    )
    at = out.find("GT")
    if at < 0:
        return product
    return product.reshape(*product.shape[:at], *split, *product.shape[at + 1 :])


def _merged(term: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    at = term.find("GT")
    return shape if at < 0 else (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
