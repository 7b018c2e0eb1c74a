"""The programs of generation: read prompts, begin answers, decode, score. Shapes are static and
few, so little is compiled.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtune.inference.sampling import Sampling, choose
from jaxtune.models.kv_cache import KVCache
from jaxtune.objectives.cross_entropy import most_at_once

MOST_STEPS = 64
"""Tokens that one call of `decode` adds to a row at most."""
_PADDING = -1


class Prefilled(NamedTuple):
    """Prompts that have been read: a cache, how long each is, and the logits of what comes next."""

    cache: KVCache
    lengths: Int[Array, " batch"]
    logits: Float[Array, "batch vocab"]


class DecodeState(NamedTuple):
    """SequenceLogProbs under way, a row of the cache for each.

    Attributes:
        cache: keys and values of all tokens but the last chosen one.
        token: the last chosen token, which is read next.
        position: where it will stand.
        keys: of the draws, one for each answer.
        number: how many tokens of the answer were chosen.
        left: how many may still be chosen.
        going: whether the answer goes on.
        seen: tokens that were read or written; without columns where the sampling does not
            remember.

    """

    cache: KVCache
    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    keys: Key[Array, " batch"]
    number: Int[Array, " batch"]
    left: Int[Array, " batch"]
    going: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"]


class Chosen(NamedTuple):
    """What a call chose.

    Attributes:
        tokens: of every row the first `made` are new tokens of its answer.
        log_probs: their log-probabilities under the model, in nats, before anything of the
            sampling.
        made: how many there are.
        going: whether the answer goes on.

    """

    tokens: Int[Array, "batch steps"]
    log_probs: Float[Array, "batch steps"]
    made: Int[Array, " batch"]
    going: Bool[Array, " batch"]


# The structure of the model is static, so engines of the same model (before and after training)
# share what is compiled.
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    graph: nnx.GraphDef,
    state: Any,
    cache: KVCache,
    ids: Int[Array, "batch seq"],
    start: jax.Array,
    lengths: Int[Array, " batch"],
) -> Prefilled:
    """Read `lengths` tokens of every row, behind the `start` tokens that the cache holds."""
    model = nnx.merge(graph, state)
    places = jnp.arange(ids.shape[1])[None]
    positions = jnp.where(places < lengths[:, None], start + places, _PADDING)
    hidden, cache = model.hidden_states(ids, positions=positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return Prefilled(cache, lengths + start, model.logits(last))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def begin(
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    cache: KVCache,
    lengths: jax.Array,
    logits: jax.Array,
    numbers: Int[Array, " batch"],
    rows: Int[Array, " batch"],
    left: Int[Array, " batch"],
    seen: Bool[Array, "batch vocab"],
) -> tuple[DecodeState, Chosen]:
    """The first token of every answer; rows that may choose none are none."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(sampling.seed), rows)
    slots = DecodeState(
        cache, jnp.zeros_like(lengths), lengths - 1, keys, numbers, left, left > 0, seen
    )
    slots, token, log_prob, kept = _chosen(slots, logits, sampling, stop_ids)
    return slots, Chosen(token[:, None], log_prob[:, None], kept.astype(jnp.int32), slots.going)


@partial(jax.jit, donate_argnums=0)
def put(slots: DecodeState, new: DecodeState, places: Int[Array, " new"]) -> DecodeState:
    """`slots` with the rows of `new` at `places`; those whose place is beyond the last are left
    out.
    """
    cache = KVCache(
        *(
            old.at[:, places].set(part, mode="drop")
            for old, part in zip(slots.cache, new.cache, strict=True)
        ),
    )
    rest = (
        old.at[places].set(part, mode="drop") for old, part in zip(slots[1:], new[1:], strict=True)
    )
    return DecodeState(cache, *rest)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    graph: nnx.GraphDef,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    state: Any,
    slots: DecodeState,
    ended: Bool[Array, " batch"],
    steps: Int[Array, ""],
    least: Int[Array, ""],
) -> tuple[DecodeState, Chosen]:
    """Up to `steps` tokens for every answer, in one loop on the device.

    Args:
        graph: the model's structure.
        stop_ids: tokens that end an answer.
        sampling: how tokens are chosen.
        state: the model's arrays.
        slots: the answers; donated.
        ended: answers that shall not go on.
        steps: at most `MOST_STEPS`.
        least: the loop also ends when no more answers than these go on, so that others can take the
            free rows.

    """
    model = nnx.merge(graph, state)
    rows = slots.token.shape[0]

    def going(carry: tuple) -> jax.Array:
        number, slots = carry[:2]
        return (number < steps) & (jnp.sum(slots.going) > least)

    def step(carry: tuple) -> tuple:
        number, slots, tokens, log_probs, made = carry
        positions = jnp.where(slots.going, slots.position, _PADDING)[:, None]
        hidden, cache = model.hidden_states(
            slots.token[:, None], positions=positions, cache=slots.cache
        )
        slots, token, log_prob, kept = _chosen(
            slots._replace(cache=cache), model.logits(hidden[:, 0]), sampling, stop_ids
        )
        tokens, log_probs = tokens.at[:, number].set(token), log_probs.at[:, number].set(log_prob)
        return number + 1, slots, tokens, log_probs, made + kept.astype(jnp.int32)

    slots = slots._replace(going=slots.going & ~ended)
    empty = (
        jnp.zeros((rows, MOST_STEPS), jnp.int32),
        jnp.zeros((rows, MOST_STEPS)),
        jnp.zeros(rows, jnp.int32),
    )
    _, slots, tokens, log_probs, made = jax.lax.while_loop(
        going, step, (jnp.zeros((), jnp.int32), slots, *empty)
    )
    return slots, Chosen(tokens, log_probs, made, slots.going)


def _chosen(
    slots: DecodeState, logits: jax.Array, sampling: Sampling, stop_ids: tuple[int, ...]
) -> tuple[DecodeState, jax.Array, jax.Array, jax.Array]:
    """The slots with the next token of every answer, that token, its log-probability, and
    whether it is part of the answer.
    """
    keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.number)
    token = choose(logits, keys, sampling, slots.seen)
    picked = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    kept = slots.going & ~jnp.isin(token, jnp.asarray(stop_ids or (-1,), jnp.int32))
    left = slots.left - kept.astype(jnp.int32)
    seen = (
        slots.seen.at[jnp.arange(len(token)), token].set(True) if sampling.remembers else slots.seen
    )
    new = slots._replace(
        token=token,
        position=slots.position + 1,
        number=slots.number + 1,
        left=left,
        going=kept & (left > 0),
        seen=seen,
    )
    return new, token, picked - jax.nn.logsumexp(logits, axis=-1), kept


@partial(jax.jit, static_argnums=0)
def score(
    graph: nnx.GraphDef,
    state: Any,
    prefilled: Prefilled,
    ids: Int[Array, "batch seq"],
    counts: Int[Array, " batch"],
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Log-probability of the first `counts` of `ids` after each prompt, summed, and whether each is
    the likeliest token at its place.

    Logits exist for a chunk of tokens at a time.
    """
    model = nnx.merge(graph, state)
    rows, width = ids.shape
    places = jnp.arange(width - 1)[None]
    positions = jnp.where(places < counts[:, None], prefilled.lengths[:, None] + places, _PADDING)
    hidden, _ = model.hidden_states(ids[:, :-1], positions=positions, cache=prefilled.cache)
    chunk = max(1, min(most_at_once() // rows, width - 1))
    turns = -(-(width - 1) // chunk)
    filled = ((0, 0), (0, turns * chunk - width + 1))
    h = jnp.pad(hidden, (*filled, (0, 0))).reshape(rows, turns, chunk, -1).swapaxes(0, 1)
    y = jnp.pad(ids[:, 1:], filled).reshape(rows, turns, chunk).swapaxes(0, 1)

    def turn(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _judged(model.logits(inputs[0]), inputs[1])

    found, likeliest = (
        part.swapaxes(0, 1).reshape(rows, -1)[:, : width - 1] for part in jax.lax.map(turn, (h, y))
    )
    first, first_likeliest = _judged(prefilled.logits, ids[:, 0])
    counted = places + 1 < counts[:, None]
    sums = jnp.where(counts > 0, first, 0.0) + jnp.sum(jnp.where(counted, found, 0.0), axis=-1)
    return sums, (first_likeliest | (counts == 0)) & jnp.all(likeliest | ~counted, axis=-1)


def _judged(
    logits: Float[Array, "*batch vocab"], ids: Int[Array, "*batch"]
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token, and whether it is the likeliest."""
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == ids
