"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtune.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; in transformers' order: repetition penalty, temperature, top-k, top-p,
    min-p.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the most likely tokens that together reach p; 1 is all.
        min_p: only tokens at least so likely as this share of the likeliest one's probability; 0 is
            all.
        repetition_penalty: what logits of tokens that were read or written before are divided by
            where positive, multiplied by where negative (Keskar et al. 2019); 1 is none.
        seed: seed of the draws; each answer has its own, by its number.

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
            raise UserError(
                f"min_p = {self.min_p}: must be at least 0 and below 1; 0 is all tokens."
            )
        if self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty = {self.repetition_penalty}: must be above 0; 1 is none."
            )

    @property
    def remembers(self) -> bool:
        """Whether it depends on the tokens before."""
        return self.repetition_penalty != 1


def choose(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    sampling: Sampling,
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Int[Array, " batch"]:
    """The next token of every row; `seen` are the tokens before, where the sampling remembers."""
    if sampling.remembers and seen is not None:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "batch vocab"], share: float) -> Float[Array, "batch vocab"]:
    """Keep a token while the more likely ones together stay below `share` (Holtzman et al.
    2020).
    """
    order = jnp.argsort(-logits, axis=-1)
    likely = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    keep = jnp.take_along_axis(before < share, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)
