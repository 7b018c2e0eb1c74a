"""Grouped-query attention over packed segments or over a cache; the one place where its kernel is chosen.

Shape letters: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, H head size.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxtune.core.axes import fitting, ways
from jaxtune.core.dtypes import precision
from jaxtune.models.layers import softcap
from jaxtune.models.remat import ATTENTION


class Mask(NamedTuple):
    """Which key a query may see: one of its own segment at its own position or before, within the window where there is one.

    Rotary positions serve as the order, so a packed row needs no other information than its segments and positions.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    window: Int[Array, ""] | None = None

    def allowed(self) -> Bool[Array, "B T S"]:
        """The mask as booleans."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        near = distance >= 0
        if self.window is not None:
            near &= distance < self.window
        return near & (self.key_segments[:, None, :] == self.query_segments[:, :, None])


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(cap(scale q k^T) + mask) v, the softmax in float32 (Vaswani et al. 2017; grouped: Ainslie et al. 2023).

    Keys and values are not repeated: the G query heads of a key/value head are rows of one product.

    On a mesh every device attends for its rows, its heads and its part of the queries; of the sequence it sees all keys and values,
    gathered over the context axis (Llama Team 2024, section 3.3.2).

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: which query sees which key.
        scale: of the scores, 1 / sqrt(H) in most families.
        cap: c in c tanh(x / c) on the scores (Gemma 2); None: no cap.

    """
    local = partial(_attend_here, scale=scale, cap=cap)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q_BTNH, k_BSKH, v_BSKH, mask)
    k_BSKH, v_BSKH = (_repeated(part, q_BTNH.shape[2], ways(mesh, "act_heads")) for part in (k_BSKH, v_BSKH))
    split = k_BSKH.shape[2] % ways(mesh, "act_heads") == 0
    queries, keys = (_layout(mesh, seq, part, split) for seq, part in (("seq", q_BTNH), (None, k_BSKH)))
    rows: Any = PartitionSpec(*queries[:2]), PartitionSpec(*keys[:2])
    window: Any = None if mask.window is None else PartitionSpec()
    masks = Mask(rows[0], rows[1], rows[0], rows[1], window)
    over = jax.shard_map(local, mesh=mesh, in_specs=(queries, keys, keys, masks), out_specs=queries, check_vma=False)
    return over(q_BTNH, k_BSKH, v_BSKH, mask)


def _layout(mesh: AbstractMesh, seq: str | None, part: jax.Array, split: bool) -> PartitionSpec:
    return fitting(mesh, ("batch", seq, "act_heads" if split else None, None), part.shape)


def _repeated(part_BSKH: Float[Array, "B S K H"], heads: int, devices: int) -> Float[Array, "B S K H"]:
    """Keys or values, each head so often that the heads divide over the devices, where the queries' heads do."""
    kv_heads = part_BSKH.shape[2]
    times = math.lcm(kv_heads, devices) // kv_heads
    return part_BSKH if times == 1 or heads % (kv_heads * times) else jnp.repeat(part_BSKH, times, axis=2)


def _attend_here(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    cap: float | None,
) -> Float[Array, "B T N H"]:
    """What one device computes."""
    batch, queries, heads, size = q_BTNH.shape
    groups = heads // k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, queries, -1, groups, size) * jnp.asarray(scale, q_BTNH.dtype)
    q_BKRH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, -1, groups * queries, size)
    bias_BTS = jnp.where(mask.allowed(), 0.0, jnp.finfo(jnp.float32).min).astype(jnp.float32)
    out_BKRH = _attend(cap, q_BKRH, k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3), bias_BTS)
    out_BKGTH = out_BKRH.reshape(batch, -1, groups, queries, size)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, size)


def _attention(
    cap: float | None,
    q_BKRH: Float[Array, "B K R H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    bias_BTS: Float[Array, "B T S"],
) -> Float[Array, "B K R H"]:
    """Attention with rows R = G x T; the probabilities are computed again in the backward pass, not kept."""
    return _attend_fwd(cap, q_BKRH, k_BKSH, v_BKSH, bias_BTS)[0]


def _scores(cap: float | None, q_BKRH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return softcap(_product("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, jnp.float32), cap)


def _masked(scores: jax.Array, bias_BTS: jax.Array) -> jax.Array:
    batch, kv_heads, rows, keys = scores.shape
    queries = bias_BTS.shape[1]
    biased = scores.reshape(batch, kv_heads, rows // queries, queries, keys) + bias_BTS[:, None, None]
    return biased.reshape(scores.shape)


def _attend_fwd(cap, q_BKRH, k_BKSH, v_BKSH, bias_BTS):
    scores = _masked(_scores(cap, q_BKRH, k_BKSH), bias_BTS)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # One exponential for the sum and the product: fused into the sum it would be computed twice.
    exps = jax.lax.optimization_barrier(jnp.exp(scores - top))
    total = jnp.sum(exps, axis=-1, keepdims=True)
    out = _product("BKRS,BKSH->BKRH", exps.astype(q_BKRH.dtype), v_BKSH, jnp.float32) / total
    out = checkpoint_name(out.astype(q_BKRH.dtype), ATTENTION)
    return out, (q_BKRH, k_BKSH, v_BKSH, bias_BTS, out, checkpoint_name(top + jnp.log(total), ATTENTION))


def _attend_bwd(cap, residuals, dout):
    """Gradients from recomputed probabilities P: dV = P^T dO, dS = P (dO V^T - rowsum(dO O)) (Dao et al. 2022, appendix B)."""
    q, k, v, bias, out, normaliser = residuals
    scores = _scores(cap, q, k)
    probs = jnp.exp(_masked(scores, bias) - normaliser)
    mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = probs * (_product("BKRH,BKSH->BKRS", dout, v, jnp.float32) - mean)
    if cap is not None:
        dscores *= 1 - jnp.square(scores / cap)
    dscores = dscores.astype(q.dtype)
    dv = _product("BKRS,BKRH->BKSH", probs.astype(q.dtype), dout, q.dtype)
    dq = _product("BKRS,BKSH->BKRH", dscores, k, q.dtype)
    dk = _product("BKRS,BKRH->BKSH", dscores, q, q.dtype)
    return dq, dk, dv, None


_attend = jax.custom_vjp(_attention, nondiff_argnums=(0,))
_attend.defvjp(_attend_fwd, _attend_bwd)


def _product(equation: str, left: jax.Array, right: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.einsum(equation, left, right, precision=precision(left.dtype), preferred_element_type=dtype)
