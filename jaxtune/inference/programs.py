"""The programs of generation: read prompts, begin answers, decode, score.

Shapes are static and few, and sampling settings are arrays, so little is compiled.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtune.inference.sampling import SamplingArrays, choose
from jaxtune.models.kv_cache import KVCache
from jaxtune.objectives.cross_entropy import max_chunk_tokens

MAX_STEPS = 64
"""The most tokens that one call of `decode` adds to a row."""
_PADDING = -1


class Prefilled(NamedTuple):
    """Prompts that have been read: a cache, how long each is, and the logits of what comes next."""

    cache: KVCache
    lengths: Int[Array, " batch"]
    logits: Float[Array, "batch vocab"]


class DecodeState(NamedTuple):
    """Answers in progress, one row of the cache each.

    Attributes:
        cache: keys and values of all tokens but the last chosen one.
        token: the last chosen token, which is read next.
        position: where that token will stand.
        keys: keys of the draws, one for each answer.
        written: how many tokens of the answer were chosen.
        left: how many may still be chosen.
        active: whether the answer goes on.
        seen: tokens that were read or written; without columns where no row has a repetition
            penalty.
        sampling: how each row's tokens are chosen.

    """

    cache: KVCache
    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    keys: Key[Array, " batch"]
    written: Int[Array, " batch"]
    left: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"]
    sampling: SamplingArrays


class Starts(NamedTuple):
    """What the first tokens of answers depend on beside their prompts, a row each.

    Attributes:
        draw: number of the answer in its call; with the seed it gives the row's key.
        written: tokens of the answer that were chosen before, where its text is read again.
        left: how many tokens may be chosen; 0 where the row holds no answer.
        seen: see `DecodeState`.
        sampling: likewise.

    """

    draw: Int[Any, " batch"]
    written: Int[Any, " batch"]
    left: Int[Any, " batch"]
    seen: Bool[Any, "batch vocab"]
    sampling: SamplingArrays


class DecodeLimits(NamedTuple):
    """When a call of `decode` ends.

    Attributes:
        ended: answers that must not go on.
        steps: tokens of an answer, at most `MAX_STEPS`.
        fewest: the loop also ends when no more answers than these go on, so that waiting prompts
            can take the free rows.

    """

    ended: Bool[Any, " batch"]
    steps: Int[Any, ""]
    fewest: Int[Any, ""]


class NewTokens(NamedTuple):
    """The tokens that one call chose.

    Attributes:
        tokens: the first `num_tokens` of a row are new tokens of its answer.
        log_probs: their log-probabilities under the model, in nats, before temperature, penalty
            and truncation.
        num_tokens: how many tokens of the row are new.
        active: whether the answer goes on.

    """

    tokens: Int[Array, "batch steps"]
    log_probs: Float[Array, "batch steps"]
    num_tokens: Int[Array, " batch"]
    active: Bool[Array, " batch"]


# The structure of the model is static, so engines of the same model (before and after training)
# share compiled programs.
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


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def begin(
    stop_ids: tuple[int, ...],
    cache: KVCache,
    lengths: Int[Array, " batch"],
    logits: Float[Array, "batch vocab"],
    starts: Starts,
) -> tuple[DecodeState, NewTokens]:
    """Choose the first token of every answer."""
    keys = jax.vmap(lambda seed: jax.random.key(seed))(starts.sampling.seed)
    keys = jax.vmap(jax.random.fold_in)(keys, starts.draw)
    state = DecodeState(
        cache,
        jnp.zeros_like(lengths),
        lengths - 1,
        keys,
        starts.written,
        starts.left,
        starts.left > 0,
        starts.seen,
        starts.sampling,
    )
    state, step = _choose_next(state, logits, stop_ids)
    kept = step.kept.astype(jnp.int32)
    return state, NewTokens(step.token[:, None], step.log_prob[:, None], kept, state.active)


@partial(jax.jit, donate_argnums=0)
def insert(state: DecodeState, new: DecodeState, rows: Int[Array, " new"]) -> DecodeState:
    """Put the answers of `new` into these rows; those whose row is beyond the last are dropped."""
    cache = KVCache(
        *(
            old.at[:, rows].set(part, mode="drop")
            for old, part in zip(state.cache, new.cache, strict=True)
        )
    )
    rest = jax.tree.map(
        lambda old, part: old.at[rows].set(part, mode="drop"),
        state._replace(cache=None),
        new._replace(cache=None),
    )
    return rest._replace(cache=cache)


@partial(jax.jit, static_argnums=(1, 2, 3))
def grow(state: DecodeState, rows: int, positions: int, columns: int) -> DecodeState:
    """Widen the state to more rows, more positions of the cache or columns of `seen`.

    New rows hold no answer.
    """

    def widen(part: jax.Array, size: int, axis: int) -> jax.Array:
        widths = [(0, 0)] * part.ndim
        widths[axis] = (0, size - part.shape[axis])
        return jnp.pad(part, widths)

    def more_rows(part: jax.Array) -> jax.Array:
        if jnp.issubdtype(part.dtype, jax.dtypes.prng_key):
            data = widen(jax.random.key_data(part), rows, 0)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(part))
        return widen(part, rows, 0)

    cache = KVCache(*(widen(widen(part, positions, 2), rows, 1) for part in state.cache))
    rest = jax.tree.map(more_rows, state._replace(cache=None))
    return rest._replace(cache=cache, seen=widen(rest.seen, columns, 1))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    graph: nnx.GraphDef,
    stop_ids: tuple[int, ...],
    weights: Any,
    state: DecodeState,
    limits: DecodeLimits,
) -> tuple[DecodeState, NewTokens]:
    """Choose tokens for every answer, in one loop on the device.

    Args:
        graph: the model's structure.
        stop_ids: tokens that end an answer.
        weights: the model's arrays.
        state: the answers; donated.
        limits: when the loop ends.

    """
    model = nnx.merge(graph, weights)
    rows = state.token.shape[0]

    def goes_on(carry: tuple) -> jax.Array:
        number, state = carry[:2]
        return (number < limits.steps) & (jnp.sum(state.active) > limits.fewest)

    def step(carry: tuple) -> tuple:
        number, state, tokens, log_probs, count = carry
        positions = jnp.where(state.active, state.position, _PADDING)[:, None]
        hidden, cache = model.hidden_states(
            state.token[:, None], positions=positions, cache=state.cache
        )
        logits = model.logits(hidden[:, 0])
        state, choice = _choose_next(state._replace(cache=cache), logits, stop_ids)
        tokens = tokens.at[:, number].set(choice.token)
        log_probs = log_probs.at[:, number].set(choice.log_prob)
        return number + 1, state, tokens, log_probs, count + choice.kept.astype(jnp.int32)

    state = state._replace(active=state.active & ~limits.ended)
    tokens, log_probs = jnp.zeros((rows, MAX_STEPS), jnp.int32), jnp.zeros((rows, MAX_STEPS))
    carry = (jnp.zeros((), jnp.int32), state, tokens, log_probs, jnp.zeros(rows, jnp.int32))
    _, state, tokens, log_probs, count = jax.lax.while_loop(goes_on, step, carry)
    return state, NewTokens(tokens, log_probs, count, state.active)


class _Choice(NamedTuple):
    """The next token of every row, its log-probability, and whether it is part of the answer."""

    token: Int[Array, " batch"]
    log_prob: Float[Array, " batch"]
    kept: Bool[Array, " batch"]


def _choose_next(
    state: DecodeState, logits: Float[Array, "batch vocab"], stop_ids: tuple[int, ...]
) -> tuple[DecodeState, _Choice]:
    """Choose the next token of every answer and move its row on."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.written)
    token = choose(logits, keys, state.sampling, state.seen)
    log_prob, _ = _score_tokens(logits, token)
    kept = state.active & ~jnp.isin(token, jnp.asarray(stop_ids or (-1,), jnp.int32))
    left = state.left - kept.astype(jnp.int32)
    seen = state.seen
    if seen.shape[1]:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    state = state._replace(
        token=token,
        position=state.position + 1,
        written=state.written + 1,
        left=left,
        active=kept & (left > 0),
        seen=seen,
    )
    return state, _Choice(token, log_prob, kept)


@partial(jax.jit, static_argnums=0)
def score(
    graph: nnx.GraphDef,
    state: Any,
    prefilled: Prefilled,
    ids: Int[Array, "batch seq"],
    counts: Int[Array, " batch"],
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Sum the log-probabilities of the first `counts` of `ids` after each prompt.

    Also say whether each of them is the likeliest token at its place. Logits exist for a chunk of
    tokens at a time.
    """
    model = nnx.merge(graph, state)
    rows, width = ids.shape
    places = jnp.arange(width - 1)[None]
    positions = jnp.where(places < counts[:, None], prefilled.lengths[:, None] + places, _PADDING)
    hidden, _ = model.hidden_states(ids[:, :-1], positions=positions, cache=prefilled.cache)
    chunk = max(1, min(max_chunk_tokens() // rows, width - 1))
    turns = -(-(width - 1) // chunk)
    padding = ((0, 0), (0, turns * chunk - width + 1))
    h = jnp.pad(hidden, (*padding, (0, 0))).reshape(rows, turns, chunk, -1).swapaxes(0, 1)
    y = jnp.pad(ids[:, 1:], padding).reshape(rows, turns, chunk).swapaxes(0, 1)

    def turn(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _score_tokens(model.logits(inputs[0]), inputs[1])

    log_probs, likeliest = (
        part.swapaxes(0, 1).reshape(rows, -1)[:, : width - 1] for part in jax.lax.map(turn, (h, y))
    )
    first, first_likeliest = _score_tokens(prefilled.logits, ids[:, 0])
    counted = places + 1 < counts[:, None]
    sums = jnp.where(counts > 0, first, 0.0) + jnp.sum(jnp.where(counted, log_probs, 0.0), axis=-1)
    return sums, (first_likeliest | (counts == 0)) & jnp.all(likeliest | ~counted, axis=-1)


def _score_tokens(
    logits: Float[Array, "*batch vocab"], ids: Int[Array, "*batch"]
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each token, and whether it is the likeliest."""
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == ids
