"""Prefill and decode with a key/value cache of static shape: few compiles, ragged prompts, a prefix that all share run once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxtune.core.errors import UserError
from jaxtune.core.processes import fetch
from jaxtune.generate.sampling import Sampling, choose
from jaxtune.models.cache import Cache, make_cache
from jaxtune.models.decoder import CausalLM

_LEAST_PREFIX = 16
_PADDING = -1


class Prefilled:
    """Prompts that have been read: a cache, how long each is, and the logits of what comes next."""

    def __init__(self, cache: Cache, lengths: Int[Array, " batch"], logits: Float[Array, "batch vocab"], rows: int) -> None:
        self.cache, self.lengths, self.logits, self.rows = cache, lengths, logits, rows


class Engine:
    """Generation and scoring with one model.

    Args:
        model: the model, with or without an adapter.
        stop_ids: tokens that end an answer.
        batch: rows that are computed together.

    """

    def __init__(self, model: CausalLM, stop_ids: Sequence[int], batch: int = 32) -> None:
        self.graph, self.state = nnx.split(model)
        self.config, self.dtype = model.config, model.compute_dtype
        self.stop_ids, self.batch = tuple(stop_ids), batch

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """The tokens generated after each prompt, up to and without the first stop token.

        Args:
            prompts: ids of each prompt, of any lengths, none empty.
            max_new_tokens: at most so many tokens each.
            sampling: greedy by default.
            progress: called with the number of prompts done.

        """
        out: list[list[int]] = []
        for start in range(0, len(prompts), self.batch):
            out += self._generate(prompts[start : start + self.batch], max_new_tokens, sampling or Sampling(), start)
            if progress:
                progress(len(out))
        return out

    def _generate(self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, first_row: int) -> list[list[int]]:
        """The answers of one batch. A text that grows past the model's `rope_limit` is read again with the frequencies of long texts."""
        limit = self.config.rope_limit
        rooms = [count if limit is None or len(prompt) > limit else min(count, limit + 1 - len(prompt)) for prompt in prompts]
        found = self.continue_from(self.prefill(prompts, max(rooms)), max(rooms), sampling, first_row)
        out = [tokens[:room] for tokens, room in zip(found, rooms, strict=True)]
        for row, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            if len(out[row]) == room < count:
                longer = self.prefill([[*prompt, *out[row]]], count - room)
                out[row] += self.continue_from(longer, count - room, sampling, first_row + row)[0]
        return out

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Prefilled:
        """Read the prompts into a cache with `room` slots for what follows.

        Raises:
            UserError: a prompt is empty, or has a token that the model has not.

        """
        self.config.check_tokens(prompts)
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError("An empty prompt: there is nothing to go on from.")
        longest = max(map(len, prompts))
        slots = _bucket(longest + room)
        common = 0 if self.config.rope_limit else _common_prefix(prompts)
        rows = 1 if len(prompts) == 1 else self.batch
        cache = make_cache(self.config, 1 if common else rows, slots, self.dtype)
        if common:
            prefix = np.asarray([prompts[0][:common]], np.int32)
            cache, _ = _prefill(self.graph, self.state, cache, prefix, jnp.zeros((), jnp.int32), jnp.asarray([common]))
            cache = cache.repeat(rows)
        ids = np.zeros((rows, _bucket(longest - common)), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - common] = prompt[common:]
            lengths[row] = len(prompt) - common
        cache, logits = _prefill(self.graph, self.state, cache, ids, jnp.asarray(common, jnp.int32), lengths)
        return Prefilled(cache, jnp.asarray(lengths + common), logits, len(prompts))

    def continue_from(self, prefilled: Prefilled, count: int, sampling: Sampling, first_row: int = 0) -> list[list[int]]:
        """Up to `count` tokens after each prefilled prompt."""
        rows = jnp.arange(prefilled.lengths.shape[0]) + first_row
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(sampling.seed), rows)
        done = jnp.arange(prefilled.lengths.shape[0]) >= prefilled.rows
        # A count that is rounded up compiles once for many; what is too much is cut.
        start = (prefilled.cache, prefilled.lengths, prefilled.logits, keys, done)
        tokens, made = _decode(self.graph, self.stop_ids, sampling, _bucket(count), self.state, *start, jnp.asarray(count))
        tokens, made = fetch((tokens, made))
        return [tokens[row, : min(made[row], count)].tolist() for row in range(prefilled.rows)]

    def score(self, prefilled: Prefilled, continuations: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probability of one continuation per prompt, in nats, its tokens summed."""
        rows = prefilled.lengths.shape[0]
        ids = np.zeros((rows, max(2, *map(len, continuations))), np.int32)
        counts = np.zeros(rows, np.int32)
        for row, tokens in enumerate(continuations):
            ids[row, : len(tokens)], counts[row] = tokens, len(tokens)
        sums = _score(self.graph, self.state, prefilled.cache, prefilled.lengths, prefilled.logits, ids, counts)
        return fetch(sums)[: prefilled.rows]


# The structure of the model is static, so engines of the same model (before and after training) share what is compiled.
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(
    graph: nnx.GraphDef, state: Any, cache: Cache, ids: jax.Array, start: jax.Array, lengths: jax.Array
) -> tuple[Cache, jax.Array]:
    model = nnx.merge(graph, state)
    places = jnp.arange(ids.shape[1])[None]
    positions = jnp.where(places < lengths[:, None], start + places, _PADDING)
    hidden, cache = model.hidden_states(ids, positions=positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return cache, model.logits(last)


@partial(jax.jit, static_argnums=0)
def _score(
    graph: nnx.GraphDef, state: Any, cache: Cache, lengths: jax.Array, logits: jax.Array, ids: jax.Array, counts: jax.Array
) -> jax.Array:
    model = nnx.merge(graph, state)
    first = jax.nn.log_softmax(logits)[jnp.arange(ids.shape[0]), ids[:, 0]]
    places = jnp.arange(ids.shape[1] - 1)[None]
    positions = jnp.where(places < counts[:, None], lengths[:, None] + places, _PADDING)
    hidden, _ = model.hidden_states(ids[:, :-1], positions=positions, cache=cache)
    following = jax.nn.log_softmax(model.logits(hidden))
    rest = jnp.take_along_axis(following, ids[:, 1:, None], axis=-1)[..., 0]
    counted = jnp.arange(1, ids.shape[1])[None] < counts[:, None]
    return jnp.where(counts > 0, first, 0.0) + jnp.sum(jnp.where(counted, rest, 0.0), axis=-1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(graph, stop_ids, sampling: Sampling, count: int, state, cache, lengths, logits, keys, done, limit):
    """All tokens in one loop on the device: `(tokens [batch, count], how many of each row are the answer)`."""
    model = nnx.merge(graph, state)
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)

    def pick(logits: jax.Array, number: jax.Array) -> jax.Array:
        return choose(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number), sampling)

    def going(carry: tuple) -> jax.Array:
        number, _, _, _, done, _ = carry
        return (number < limit) & ~jnp.all(done)

    def step(carry: tuple) -> tuple:
        number, cache, logits, tokens, done, made = carry
        token = pick(logits, number)
        done |= jnp.isin(token, stops)
        tokens = tokens.at[:, number].set(token)
        made += (~done).astype(jnp.int32)
        positions = (lengths + number)[:, None]
        hidden, cache = model.hidden_states(token[:, None], positions=positions, cache=cache)
        return number + 1, cache, model.logits(hidden[:, 0]), tokens, done, made

    rows = lengths.shape[0]
    start = (jnp.zeros((), jnp.int32), cache, logits, jnp.zeros((rows, count), jnp.int32), done, jnp.zeros(rows, jnp.int32))
    _, _, _, tokens, _, made = jax.lax.while_loop(going, step, start)
    return tokens, made


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, rounded down so that few lengths compile; 0 where it does not pay."""
    if len(prompts) < 2:
        return 0
    least = min(map(len, prompts)) - 1
    first = prompts[0]
    shared = next((at for at in range(least) if any(prompt[at] != first[at] for prompt in prompts)), least)
    return shared - shared % _LEAST_PREFIX


def _bucket(size: int) -> int:
    """The next of a few sizes: 16, 24, 32, 48, 64, 96 ... so that shapes stay few."""
    bucket = 16
    while bucket < size:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 and bucket * 3 // 2 >= size else 1 << bucket.bit_length()
    return bucket
