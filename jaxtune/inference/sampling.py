"""Choosing the next token from logits, each row with settings of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtune.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How one answer's tokens are chosen.

    The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the most likely tokens that together reach p; 1 is all.
        min_p: only tokens whose probability is at least this share of the likeliest one's; 0 is
            all.
        repetition_penalty: divides positive logits of tokens that were read or written before and
            multiplies negative ones (Keskar et al. 2019); 1 is none.
        seed: seed of the draws; each answer of a call has its own, by its number.

    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature = {self.temperature}: must not be negative; 0 is greedy.")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must not be negative; 0 is all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1.")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p = {self.min_p}: must be at least 0 and below 1; 0 is all.")
        if self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty = {self.repetition_penalty}: must be above 0; 1 is none."
            )

    @property
    def remembers(self) -> bool:
        """Whether it depends on the tokens before."""
        return self.repetition_penalty != 1


class SamplingArrays(NamedTuple):
    """The settings of every row, as arrays: other numbers compile nothing.

    Attributes: see `Sampling`; `seed` as jax.random.key takes it, int32.

    """

    temperature: Float[Any, " batch"]
    top_k: Int[Any, " batch"]
    top_p: Float[Any, " batch"]
    min_p: Float[Any, " batch"]
    repetition_penalty: Float[Any, " batch"]
    seed: Int[Any, " batch"]

    @classmethod
    def of(cls, settings: Sequence[Sampling], rows: int) -> "SamplingArrays":
        """Return the settings of the first rows; rows beyond them are greedy."""
        filled = [*settings, *[Sampling()] * (rows - len(settings))]
        return cls(
            np.asarray([row.temperature for row in filled], np.float32),
            np.asarray([row.top_k for row in filled], np.int32),
            np.asarray([row.top_p for row in filled], np.float32),
            np.asarray([row.min_p for row in filled], np.float32),
            np.asarray([row.repetition_penalty for row in filled], np.float32),
            np.asarray([row.seed for row in filled], np.int64).astype(np.int32),
        )


def choose(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    sampling: SamplingArrays,
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Int[Array, " batch"]:
    """Return the next token of every row.

    Work that no row asks for (sorting, drawing) is passed over when the program runs.

    Args:
        logits: of the next token.
        keys: of the draws.
        sampling: each row's settings.
        seen: the tokens that each row has read or written; None, or no columns, where no row has a
            repetition penalty.

    """
    if seen is not None and seen.shape[1]:
        penalty = sampling.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = sampling.temperature > 0

    def drawn() -> jax.Array:
        scaled = logits / jnp.where(draws, sampling.temperature, 1.0)[:, None]
        limits = ((sampling.top_k > 0) | (sampling.top_p < 1)) & draws
        kept = jax.lax.cond(jnp.any(limits), lambda: _nucleus(scaled, sampling), lambda: scaled)
        least = jnp.max(kept, axis=-1) + jnp.log(sampling.min_p)
        kept = jnp.where(kept < least[:, None], -jnp.inf, kept)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    return jnp.where(draws, jax.lax.cond(jnp.any(draws), drawn, lambda: greedy), greedy)


def _nucleus(
    logits: Float[Array, "batch vocab"], sampling: SamplingArrays
) -> Float[Array, "batch vocab"]:
    """Keep the k most likely tokens, ties with the last of them too.

    Of these keep a token while the more likely ones together stay below p (Holtzman et al. 2020).
    """
    order = jnp.argsort(-logits, axis=-1)
    falling = jnp.take_along_axis(logits, order, axis=-1)
    last = jnp.clip(sampling.top_k - 1, 0, logits.shape[-1] - 1)[:, None]
    limited = (sampling.top_k > 0)[:, None]
    smallest = jnp.where(limited, jnp.take_along_axis(falling, last, axis=-1), -jnp.inf)
    falling = jnp.where(falling < smallest, -jnp.inf, falling)
    likely = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    share = sampling.top_p[:, None]
    keep = (before < share) | (share >= 1)
    kept = jnp.where(keep, falling, -jnp.inf)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
