"""Linear head and cross-entropy in one, over chunks of tokens: the logits of a whole batch never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.core.dtypes import precision
from jaxtune.models.layers import matmul, softcap

CHUNK = 256


def linear_cross_entropy(
    hidden: Float[Array, "tokens embed"],
    head: Float[Array, "vocab embed"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    cap: float | None = None,
) -> Float[Array, ""]:
    """sum_t w_t (logsumexp(z_t) - z_t[y_t]) with z_t = h_t W^T, or c tanh(h_t W^T / c) under a cap, in nats.

    The gradient with respect to `hidden` is made in the forward pass, chunk by chunk, so that the backward pass needs no
    logits; the gradient with respect to `head` is made only where someone asks for it.

    Args:
        hidden: states before the head, any float dtype.
        head: the head's matrix, in Hugging Face's layout.
        targets: the next token at each position.
        weights: weight of each target, float32; 0 where it is not supervised.
        cap: c, for families that bound their logits (Gemma 2).

    Returns:
        The sum of the weighted token losses, float32.

    """
    return _loss(hidden, head, targets, weights, cap)


def in_chunks(*parts: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays with a number of tokens in front, cut into runs of `CHUNK` tokens; the last one is filled with zeros."""
    tokens = parts[0].shape[0]
    size = min(CHUNK, tokens)
    padded = (jnp.pad(part, ((0, -tokens % size), *(((0, 0),) * (part.ndim - 1)))) for part in parts)
    return tuple(part.reshape(-1, size, *part.shape[1:]) for part in padded)


def _primal(hidden, head, targets, weights, cap: float | None) -> jax.Array:
    return _forward(hidden, head, targets, weights, cap, hidden_gradient=False, head_gradient=False)[0]


def _forward(hidden, head, targets, weights, cap: float | None, *, hidden_gradient: bool, head_gradient: bool):
    tokens, embed = hidden.shape
    chunks = in_chunks(hidden, targets, weights)
    chunk = chunks[0].shape[1]

    def step(carry, inputs):
        loss, head_sum = carry
        h, y, w = inputs
        logits = softcap(matmul(h, head).astype(jnp.float32), cap)
        slope = None if cap is None else 1 - jnp.square(logits / cap)
        top = jnp.max(logits, axis=-1)
        # The barrier keeps one exponential for the sum and the gradient; fused into the sum it would be computed twice.
        exps = jax.lax.optimization_barrier(jnp.exp(logits - top[:, None]))
        total = jnp.sum(exps, axis=-1)
        loss += jnp.sum(w * (top + jnp.log(total) - jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]))
        gradient = None
        if hidden_gradient:
            # w (softmax(logits) - onehot(y)) W, normalised after the product, where it is cheap; under a cap times its slope
            sloped, at_target = (exps, w) if slope is None else (exps * slope, w * slope[jnp.arange(chunk), y])
            mean = _times_head(sloped.astype(h.dtype), head).astype(jnp.float32) * (w / total)[:, None]
            gradient = (mean - at_target[:, None] * head[y].astype(jnp.float32)).astype(h.dtype)
        if head_gradient:
            error = (exps * (w / total)[:, None]).at[jnp.arange(chunk), y].add(-w)
            error = (error if slope is None else error * slope).astype(h.dtype)
            head_sum += jax.lax.dot_general(error, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (loss, head_sum), gradient

    head_sum = jnp.zeros(head.shape, jnp.float32) if head_gradient else None
    (loss, head_sum), gradient = jax.lax.scan(step, (jnp.zeros((), jnp.float32), head_sum), chunks)
    return loss, None if gradient is None else gradient.reshape(-1, embed)[:tokens], head_sum


def _times_head(x: Float[Array, "tokens vocab"], head: Float[Array, "vocab embed"]) -> Float[Array, "tokens embed"]:
    return jax.lax.dot_general(x, head.astype(x.dtype), (((1,), (0,)), ((), ())), precision=precision(x.dtype))


def _fwd(hidden, head, targets, weights, cap):
    loss, hidden_grad, head_grad = _forward(
        hidden.value,
        head.value,
        targets.value,
        weights.value,
        cap,
        hidden_gradient=hidden.perturbed,
        head_gradient=head.perturbed,
    )
    return loss, (hidden_grad, None if head_grad is None else head_grad.astype(head.value.dtype))


def _bwd(cap, residuals, cotangent):
    hidden_grad, head_grad = (
        None if part is None else (part.astype(jnp.float32) * cotangent).astype(part.dtype) for part in residuals
    )
    return hidden_grad, head_grad, None, None


_loss = jax.custom_vjp(_primal, nondiff_argnums=(4,))
_loss.defvjp(_fwd, _bwd, symbolic_zeros=True)
