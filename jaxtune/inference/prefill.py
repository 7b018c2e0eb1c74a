"""Reading prompts into a cache: in few shapes, and what all begin with only once."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.core.errors import UserError
from jaxtune.inference import programs
from jaxtune.inference.programs import Prefilled
from jaxtune.inference.speed import Speed, seconds
from jaxtune.models.decoder import CausalLM
from jaxtune.models.kv_cache import KVCache, make_kv_cache

TokenIds = Sequence[int]


class Prefix(NamedTuple):
    """What several prompts begin with, in a cache of one row."""

    cache: KVCache
    length: int


_SHORTEST_PREFIX = 16
_SMALLEST_BUCKET = 16


class Prefiller:
    """A model that reads prompts.

    Args:
        model: the model, with or without an adapter.

    """

    def __init__(self, model: CausalLM) -> None:
        self.graph, self.weights = nnx.split(model)
        self.config, self.speed = model.config, Speed()
        self._dtype = model.compute_dtype

    def check(self, prompts: Sequence[TokenIds]) -> None:
        """Check that the prompts can be read.

        Raises:
            UserError: one is empty, or has a token that the model does not have.

        """
        self.config.check_tokens(prompts)
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError("A prompt is empty: there is nothing to continue.")

    def prefix(self, prompts: Sequence[TokenIds], positions: int) -> Prefix | None:
        """Read what all prompts begin with into a cache of so many positions.

        Returns:
            None where it does not pay.

        """
        common = 0 if self.config.rope_limit else _common_prefix(prompts)
        if not common:
            return None
        ids, lengths = np.asarray([prompts[0][:common]], np.int32), np.asarray([common], np.int32)
        return Prefix(self._prefill(self._empty(1, positions), ids, 0, lengths).cache, common)

    def read(
        self, prompts: Sequence[TokenIds], rows: int, positions: int, prefix: Prefix | None = None
    ) -> Prefilled:
        """Read prompts into the first rows of a cache; rows beyond them are padding.

        Args:
            prompts: ids of each prompt; all begin with `prefix`, where there is one.
            rows: rows of the cache.
            positions: positions a row.
            prefix: what was read before.

        """
        if prefix is None:
            cache, common = self._empty(rows, positions), 0
        else:
            cache, common = _repeat(prefix.cache, rows, positions), prefix.length
        ids = np.zeros((rows, bucket(max(map(len, prompts)) - common)), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - common] = prompt[common:]
            lengths[row] = len(prompt) - common
        return self._prefill(cache, ids, common, lengths, len(prompts))

    def _prefill(
        self,
        cache: KVCache,
        ids: np.ndarray,
        start: int,
        lengths: np.ndarray,
        prompts: int | None = None,
    ) -> Prefilled:
        with seconds() as elapsed:
            prefilled = programs.prefill(
                self.graph, self.weights, cache, ids, np.int32(start), lengths
            )
            prefilled.logits.block_until_ready()
        self.speed.prompt_tokens += int(lengths[:prompts].sum())
        self.speed.prefill_seconds += elapsed[0]
        return prefilled

    def _empty(self, rows: int, positions: int) -> KVCache:
        return make_kv_cache(self.config, rows, positions, self._dtype)


def _repeat(cache: KVCache, rows: int, positions: int) -> KVCache:
    """Return the cache of one row for so many, with room for so many positions."""
    missing = positions - cache.keys.shape[2]
    if missing > 0:
        widths = ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0))
        cache = KVCache(*(jnp.pad(part, widths) for part in cache))
    elif missing < 0:
        cache = KVCache(*(jax.lax.slice_in_dim(part, 0, positions, axis=2) for part in cache))
    # The cache that is read into is donated, and the prefix's own must outlive that.
    return KVCache(*map(jnp.copy, cache)) if rows == 1 else cache.repeat(rows)


def _common_prefix(prompts: Sequence[TokenIds]) -> int:
    """Count the tokens that all prompts begin with.

    The count is rounded down so that few lengths compile; it is 0 where a prefix does not pay.
    """
    if len(prompts) < 2:
        return 0
    longest = min(map(len, prompts)) - 1
    first = prompts[0]
    common = next(
        (at for at in range(longest) if any(prompt[at] != first[at] for prompt in prompts)), longest
    )
    return common - common % _SHORTEST_PREFIX


def bucket(size: int, smallest: int = _SMALLEST_BUCKET) -> int:
    """Round up to one of a few sizes, 16, 24, 32, 48, 64, 96 ..., so that shapes stay few."""
    rounded = smallest
    while rounded < size:
        half = rounded * 3 // 2
        is_power = rounded & (rounded - 1) == 0
        rounded = half if is_power and rounded > 1 and half >= size else 1 << rounded.bit_length()
    return rounded
