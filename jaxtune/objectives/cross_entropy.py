"""Linear head and cross-entropy in one, over chunks of tokens: the logits of a whole batch never
exist.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.core.hardware import platform
from jaxtune.core.sharding import axis_size, constrain, num_shards
from jaxtune.models.kernels.dot import dot, weight_grad
from jaxtune.models.layers import matmul, softcap

# Tokens in a chunk.
CHUNK = 256  # an accelerator reads the whole head for each chunk; smaller ones would starve it
GPU_CHUNK = 1024  # launching a chunk's kernels and checking its condition cost the same at any size
CPU_CHUNK = 128  # moving logits is what costs; those of fewer tokens stay in the cache
_MASKED = -1e9


def max_chunk_tokens() -> int:
    """Return the largest number of tokens whose logits exist at the same time on a device."""
    return {"cpu": CPU_CHUNK, "gpu": GPU_CHUNK}.get(platform(), CHUNK)


@dataclass(frozen=True)
class Chunks:
    """A split of a batch's tokens into chunks for a loop. In each chunk every device takes `size`
    of its own tokens, so no token moves to another device.

    Attributes:
        shape: rows, and tokens per row.

    """

    shape: tuple[int, ...]

    @property
    def shards(self) -> tuple[int, int]:
        """Return the number of parts the mesh splits the rows into, and each row's tokens."""
        return num_shards("batch", self.shape[0]), num_shards("seq", self.shape[1])

    @property
    def size(self) -> int:
        """Return the number of tokens a device takes per chunk."""
        return min(max_chunk_tokens(), math.prod(self.shape) // math.prod(self.shards))

    def split(
        self, x: Float[Array, "batch seq *rest"]
    ) -> Float[Array, "chunks shards tokens *rest"]:
        """Split a batch's tokens into chunks, the last ones padded with zeros."""
        return self.split_chunks(self.split_shards(x))

    def join(
        self, chunks: Float[Array, "chunks shards tokens *rest"]
    ) -> Float[Array, "batch seq *rest"]:
        """Undo `split`."""
        return self.join_shards(self.join_chunks(chunks))

    def split_shards(
        self, x: Float[Array, "batch seq *rest"]
    ) -> Float[Array, "shards tokens *rest"]:
        """Lay each device's tokens in one line, padded with zeros to a whole number of chunks."""
        (rows, tokens), rest = self.shards, x.shape[2:]
        split = x.reshape(rows, self.shape[0] // rows, tokens, self.shape[1] // tokens, *rest)
        lines = jnp.moveaxis(split, 2, 1).reshape(rows * tokens, -1, *rest)
        lines = jnp.pad(lines, ((0, 0), (0, -lines.shape[1] % self.size), *(((0, 0),) * len(rest))))
        return constrain(lines, "tokens", None, *((None,) * len(rest)))

    def join_shards(
        self, lines: Float[Array, "shards tokens *rest"]
    ) -> Float[Array, "batch seq *rest"]:
        """Undo `split_shards`."""
        (rows, tokens), rest = self.shards, lines.shape[2:]
        local = (self.shape[0] // rows, self.shape[1] // tokens)
        split = lines[:, : math.prod(local)].reshape(rows, tokens, *local, *rest)
        return constrain(
            jnp.moveaxis(split, 1, 2).reshape(*self.shape, *rest),
            "batch",
            "seq",
            *((None,) * len(rest)),
        )

    def split_chunks(
        self, lines: Float[Array, "shards tokens *rest"]
    ) -> Float[Array, "chunks shards tokens *rest"]:
        """Split the lines of all devices into chunks."""
        return jnp.moveaxis(lines.reshape(lines.shape[0], -1, self.size, *lines.shape[2:]), 1, 0)

    def join_chunks(
        self, chunks: Float[Array, "chunks shards tokens *rest"]
    ) -> Float[Array, "shards tokens *rest"]:
        """Undo `split_chunks`."""
        return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])


def gather_head(head: Float[Array, "vocab embed"]) -> Float[Array, "rows embed"]:
    """Gather the head once, before a loop over chunks, and shard it over the vocabulary only.

    Where the vocabulary does not divide over its mesh axis, rows of zeros are added;
    `compute_logits` masks them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    missing = 0 if mesh.empty else -head.shape[0] % axis_size(mesh, "vocab")
    return constrain(jnp.pad(head, ((0, missing), (0, 0))) if missing else head, "vocab", None)


def compute_logits(
    hidden: Float[Array, "shards tokens embed"],
    head: Float[Array, "rows embed"],
    vocab: int,
    cap: float | None,
) -> Float[Array, "shards tokens rows"]:
    """Return float32 logits; those of rows beyond the vocabulary have no probability."""
    logits = softcap(matmul(hidden, head).astype(jnp.float32), cap)
    if head.shape[0] != vocab:
        rows = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(rows < vocab, logits, _MASKED)
    return constrain(logits, "tokens", None, "vocab")


def select_targets(
    values: Float[Array, "*tokens vocab"], targets: Int[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """Return each token's value at its target.

    It is a sum over the vocabulary, since indexing would gather a vocabulary that is sharded.
    """
    return jnp.sum(jnp.where(_is_target(values, targets), values, 0.0), axis=-1)


def _is_target(values: jax.Array, targets: jax.Array) -> jax.Array:
    rows = jax.lax.broadcasted_iota(targets.dtype, values.shape, values.ndim - 1)
    return rows == targets[..., None]


def linear_cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    cap: float | None = None,
) -> Float[Array, ""]:
    """Return sum_t w_t (logsumexp(z_t) - z_t[y_t]) in nats, where z_t = h_t W^T, or
    c tanh(h_t W^T / c) under a cap.

    The forward pass computes the gradient with respect to `hidden` chunk by chunk, so the backward
    pass needs no logits. It computes the gradient with respect to `head` only where one is asked
    for.

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


def _primal(hidden, head, targets, weights, cap: float | None) -> jax.Array:
    return _forward(
        hidden, head, targets, weights, cap, hidden_gradient=False, head_gradient=False
    )[0]


def _forward(
    hidden, head, targets, weights, cap: float | None, *, hidden_gradient: bool, head_gradient: bool
):
    chunks, vocab, head = Chunks(targets.shape), head.shape[0], gather_head(head)
    arrange, restore = _order_supervised_first(chunks, weights)

    def scan_chunk(sums, inputs):
        return jax.lax.cond(jnp.any(inputs[2] != 0), add_chunk, skip_chunk, sums, *inputs)

    def add_chunk(sums, h, y, w):
        loss, head_sum = sums
        logits = compute_logits(h, head, vocab, cap)
        top = jnp.max(logits, axis=-1)
        # The barrier keeps one exponential for the sum and the gradient; fused into the sum it
        # would be computed twice.
        exps = jax.lax.optimization_barrier(jnp.exp(logits - top[..., None]))
        total = jnp.sum(exps, axis=-1)
        loss += jnp.sum(w * (top + jnp.log(total) - select_targets(logits, y)))
        # total (softmax(logits) - onehot(y)), times the cap's slope where there is one; divided by
        # total after the product, where it is cheap
        error = exps - jnp.where(_is_target(exps, y), total[..., None], 0.0)
        error = (error if cap is None else error * (1 - jnp.square(logits / cap))).astype(h.dtype)
        scale, gradient = (w / total)[..., None], None
        if hidden_gradient:
            gradient = (dot(error, head, 0).astype(jnp.float32) * scale).astype(h.dtype)
        if head_gradient:
            head_sum += weight_grad((error.astype(jnp.float32) * scale).astype(h.dtype), h)
        return (loss, head_sum), gradient

    def skip_chunk(sums, h, y, w):
        return sums, jnp.zeros_like(h) if hidden_gradient else None

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(head.shape, jnp.float32) if head_gradient else None,
    )
    inputs = tuple(
        chunks.split_chunks(arrange(chunks.split_shards(x))) for x in (hidden, targets, weights)
    )
    (loss, head_sum), gradients = jax.lax.scan(scan_chunk, start, inputs)
    gradient = (
        None if gradients is None else chunks.join_shards(restore(chunks.join_chunks(gradients)))
    )
    return loss, gradient, None if head_sum is None else head_sum[:vocab]


def _order_supervised_first(
    chunks: Chunks, weights: Float[Array, "batch seq"]
) -> tuple[Callable, Callable]:
    """Return a function that moves the tokens without weight to the end of their device's line, and
    one that undoes it.

    Chunks are then full of supervised tokens or have none, and one that has none computes no
    logits. On accelerators the order stays: reordering would copy the hidden states twice.
    """
    if platform() != "cpu":
        return (lambda lines: lines), (lambda lines: lines)
    order = jnp.argsort(chunks.split_shards(weights) == 0, axis=1, stable=True)
    return (lambda lines: _take(lines, order)), (
        lambda lines: _take(lines, jnp.argsort(order, axis=1))
    )


_take = jax.vmap(
    lambda line, places: line.at[places].get(mode="promise_in_bounds", unique_indices=True)
)


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
        None if part is None else (part.astype(jnp.float32) * cotangent).astype(part.dtype)
        for part in residuals
    )
    return hidden_grad, head_grad, None, None


_loss = jax.custom_vjp(_primal, nondiff_argnums=(4,))
_loss.defvjp(_fwd, _bwd, symbolic_zeros=True)
