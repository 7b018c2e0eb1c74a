"""Reading prompts into a cache: in few shapes, what all begin with once."""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from jaxtune.core.errors import UserError
from jaxtune.inference import programs
from jaxtune.inference.programs import Prefilled
from jaxtune.inference.speed import Speed, seconds
from jaxtune.models.decoder import CausalLM
from jaxtune.models.kv_cache import KVCache, make_kv_cache

Prompt = Sequence[int]
Prefix = tuple[KVCache, int]
"""What all prompts begin with, in a cache of one row, and how many tokens that is."""

_LEAST_PREFIX = 16
_LEAST_BUCKET = 16


class Prefiller:
    """A model that reads prompts.

    Args:
        model: the model, with or without an adapter.

    """

    def __init__(self, model: CausalLM) -> None:
        self.graph, self.state = nnx.split(model)
        self.config, self.speed = model.config, Speed()
        self._dtype = model.compute_dtype

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Whether they can be read.

        Raises:
            UserError: one is empty, or has a token that the model has not.

        """
        self.config.check_tokens(prompts)
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError("An empty prompt: there is nothing to go on from.")

    def prefix(self, prompts: Sequence[Prompt], size: int) -> Prefix | None:
        """What all prompts begin with, read once into a cache of `size` positions; None where it
        does not pay.
        """
        common = 0 if self.config.rope_limit else _common_prefix(prompts)
        if not common:
            return None
        ids = np.asarray([prompts[0][:common]], np.int32)
        return self._timed(
            self._empty(1, size), ids, 0, np.asarray([common], np.int32), common
        ).cache, common

    def read(
        self, prompts: Sequence[Prompt], size: int, prefix: Prefix | None, rows: int
    ) -> Prefilled:
        """Prompts in a cache of so many rows, those beyond them padding, and of `size` positions
        a row.
        """
        cache, common = (
            (prefix[0].repeat(rows), prefix[1]) if prefix else (self._empty(rows, size), 0)
        )
        ids = np.zeros((rows, bucket(max(map(len, prompts)) - common)), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - common] = prompt[common:]
            lengths[row] = len(prompt) - common
        return self._timed(cache, ids, common, lengths, int(lengths[: len(prompts)].sum()))

    def _timed(
        self, cache: KVCache, ids: np.ndarray, start: int, lengths: np.ndarray, tokens: int
    ) -> Prefilled:
        with seconds() as taken:
            read = programs.prefill(self.graph, self.state, cache, ids, np.int32(start), lengths)
            read.logits.block_until_ready()
        self.speed.prompt_tokens += tokens
        self.speed.prefill_seconds += taken[0]
        return read

    def _empty(self, rows: int, size: int) -> KVCache:
        return make_kv_cache(self.config, rows, size, self._dtype)


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """Tokens that all prompts begin with, rounded down so that few lengths compile; 0 where it
    does not pay.
    """
    if len(prompts) < 2:
        return 0
    least = min(map(len, prompts)) - 1
    first = prompts[0]
    shared = next(
        (at for at in range(least) if any(prompt[at] != first[at] for prompt in prompts)), least
    )
    return shared - shared % _LEAST_PREFIX


def bucket(size: int, least: int = _LEAST_BUCKET) -> int:
    """The next of a few sizes: 16, 24, 32, 48, 64, 96 ... so that shapes stay few."""
    bucket = least
    while bucket < size:
        half = bucket * 3 // 2
        bucket = (
            half
            if bucket & (bucket - 1) == 0 and bucket > 1 and half >= size
            else 1 << bucket.bit_length()
        )
    return bucket
