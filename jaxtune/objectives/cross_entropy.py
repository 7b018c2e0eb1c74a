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
from jaxtune.models.kernels.dot import dot
from jaxtune.models.layers import matmul, softcap

CHUNK = (
    256  # tokens; an accelerator reads the head anew for each chunk, so that fewer would starve it
)
GPU_CHUNK = (
    1024  # a turn there is some kernels, whose start and condition cost as much for few tokens
)
CPU_CHUNK = 128  # there the logits are what is moved, and of fewer tokens more stay in the cache
_NEVER = -1e9


def most_at_once() -> int:
    """Tokens of a device whose logits exist at the same time, at most."""
    return {"cpu": CPU_CHUNK, "gpu": GPU_CHUNK}.get(platform(), CHUNK)


@dataclass(frozen=True)
class Chunks:
    """A batch's tokens cut into chunks for a loop; each device takes so many of its own tokens at
    every turn, and none are moved.

    Args:
        shape: rows and tokens a row.

    """

    shape: tuple[int, ...]

    @property
    def groups(self) -> tuple[int, int]:
        """Into how many parts the mesh cuts the rows, and each row's tokens."""
        return num_shards("batch", self.shape[0]), num_shards("seq", self.shape[1])

    @property
    def size(self) -> int:
        """Tokens that a device takes at a turn."""
        return min(most_at_once(), math.prod(self.shape) // math.prod(self.groups))

    def cut(
        self, part: Float[Array, "batch seq *rest"]
    ) -> Float[Array, "turns groups tokens *rest"]:
        """The turns' tokens, the last ones filled with zeros."""
        return self.turns(self.lines(part))

    def join(
        self, turns: Float[Array, "turns groups tokens *rest"]
    ) -> Float[Array, "batch seq *rest"]:
        """The inverse of `cut`."""
        return self.whole(self.in_line(turns))

    def lines(self, part: Float[Array, "batch seq *rest"]) -> Float[Array, "groups tokens *rest"]:
        """Each device's tokens one after the other, filled with zeros to a whole number of
        turns.
        """
        (rows, tokens), rest = self.groups, part.shape[2:]
        split = part.reshape(rows, self.shape[0] // rows, tokens, self.shape[1] // tokens, *rest)
        lines = jnp.moveaxis(split, 2, 1).reshape(rows * tokens, -1, *rest)
        lines = jnp.pad(lines, ((0, 0), (0, -lines.shape[1] % self.size), *(((0, 0),) * len(rest))))
        return constrain(lines, "tokens", None, *((None,) * len(rest)))

    def whole(self, lines: Float[Array, "groups tokens *rest"]) -> Float[Array, "batch seq *rest"]:
        """The inverse of `lines`."""
        (rows, tokens), rest = self.groups, lines.shape[2:]
        here = (self.shape[0] // rows, self.shape[1] // tokens)
        split = lines[:, : math.prod(here)].reshape(rows, tokens, *here, *rest)
        return constrain(
            jnp.moveaxis(split, 1, 2).reshape(*self.shape, *rest),
            "batch",
            "seq",
            *((None,) * len(rest)),
        )

    def turns(
        self, lines: Float[Array, "groups tokens *rest"]
    ) -> Float[Array, "turns groups tokens *rest"]:
        """Lines as the turns' tokens."""
        return jnp.moveaxis(lines.reshape(lines.shape[0], -1, self.size, *lines.shape[2:]), 1, 0)

    def in_line(
        self, turns: Float[Array, "turns groups tokens *rest"]
    ) -> Float[Array, "groups tokens *rest"]:
        """The inverse of `turns`."""
        return jnp.moveaxis(turns, 0, 1).reshape(turns.shape[1], -1, *turns.shape[3:])


def whole_head(head: Float[Array, "vocab embed"]) -> Float[Array, "rows embed"]:
    """The head as a loop over chunks needs it: cut over the vocabulary only, gathered once and not
    at every turn.

    Where the vocabulary does not divide over its mesh axis, rows of zeros are added; `logits_of`
    hides them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    missing = 0 if mesh.empty else -head.shape[0] % axis_size(mesh, "vocab")
    return constrain(jnp.pad(head, ((0, missing), (0, 0))) if missing else head, "vocab", None)


def logits_of(
    hidden: Float[Array, "groups tokens embed"],
    head: Float[Array, "rows embed"],
    vocab: int,
    cap: float | None,
) -> Float[Array, "groups tokens rows"]:
    """Float32 logits, those of rows beyond the vocabulary so low that they are never chosen."""
    logits = softcap(matmul(hidden, head).astype(jnp.float32), cap)
    if head.shape[0] != vocab:
        logits = jnp.where(
            jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < vocab,
            logits,
            _NEVER,
        )
    return constrain(logits, "tokens", None, "vocab")


def at(
    values: Float[Array, "*tokens vocab"], targets: Int[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """Each token's value at its target; a sum, since a look-up would gather a vocabulary that is
    sharded.
    """
    return jnp.sum(jnp.where(_is_target(values, targets), values, 0.0), axis=-1)


def _is_target(values: jax.Array, targets: jax.Array) -> jax.Array:
    return (
        jax.lax.broadcasted_iota(targets.dtype, values.shape, values.ndim - 1) == targets[..., None]
    )


def linear_cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    cap: float | None = None,
) -> Float[Array, ""]:
    """sum_t w_t (logsumexp(z_t) - z_t[y_t]) with z_t = h_t W^T, or c tanh(h_t W^T / c) under a cap,
    in nats.

    The gradient with respect to `hidden` is made in the forward pass, chunk by chunk, so that the
    backward pass needs no logits; the gradient with respect to `head` is made only where someone
    asks for it.

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
    chunks, vocab, head = Chunks(targets.shape), head.shape[0], whole_head(head)
    arranged, restored = _supervised_first(chunks, weights)

    def step(sums, inputs):
        return jax.lax.cond(jnp.any(inputs[2] != 0), look, pass_over, sums, *inputs)

    def look(sums, h, y, w):
        loss, head_sum = sums
        logits = logits_of(h, head, vocab, cap)
        top = jnp.max(logits, axis=-1)
        # The barrier keeps one exponential for the sum and the gradient; fused into the sum it
        # would be computed twice.
        exps = jax.lax.optimization_barrier(jnp.exp(logits - top[..., None]))
        total = jnp.sum(exps, axis=-1)
        loss += jnp.sum(w * (top + jnp.log(total) - at(logits, y)))
        # total (softmax(logits) - onehot(y)), under a cap times its slope; normalized after the
        # product, where it is cheap
        error = exps - jnp.where(_is_target(exps, y), total[..., None], 0.0)
        error = (error if cap is None else error * (1 - jnp.square(logits / cap))).astype(h.dtype)
        scale, gradient = (w / total)[..., None], None
        if hidden_gradient:
            gradient = (dot(error, head, 0).astype(jnp.float32) * scale).astype(h.dtype)
        if head_gradient:
            scaled = (error.astype(jnp.float32) * scale).astype(h.dtype)
            both = (((0, 1), (0, 1)), ((), ()))
            head_sum += jax.lax.dot_general(scaled, h, both, preferred_element_type=jnp.float32)
        return (loss, head_sum), gradient

    def pass_over(sums, h, y, w):
        return sums, jnp.zeros_like(h) if hidden_gradient else None

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(head.shape, jnp.float32) if head_gradient else None,
    )
    parts = tuple(chunks.turns(arranged(chunks.lines(part))) for part in (hidden, targets, weights))
    (loss, head_sum), turns = jax.lax.scan(step, start, parts)
    gradient = None if turns is None else chunks.whole(restored(chunks.in_line(turns)))
    return loss, gradient, None if head_sum is None else head_sum[:vocab]


def _supervised_first(
    chunks: Chunks, weights: Float[Array, "batch seq"]
) -> tuple[Callable, Callable]:
    """How to arrange lines so that what has no weight comes last, and how to undo it: then a turn
    has either many tokens or none.

    A turn without any has no logits. On accelerators the order stays, since there the exchange
    costs two copies of the hidden states.
    """
    if platform() != "cpu":
        return (lambda lines: lines), (lambda lines: lines)
    order = jnp.argsort(chunks.lines(weights) == 0, axis=1, stable=True)
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
