"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxtune.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the filters apply in transformers' order: temperature, top-k, top-p.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the most likely tokens that together reach p; 1 is all.
        seed: seed of the draws; each row of a batch has its own.

    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature = {self.temperature}: must not be negative; 0 is greedy.")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must not be negative; 0 is all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1.")


def choose(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], sampling: Sampling) -> Int[Array, " batch"]:
    """The next token of every row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "batch vocab"], share: float) -> Float[Array, "batch vocab"]:
    """Keep a token while the more likely ones together stay below `share` (Holtzman et al. 2020)."""
    order = jnp.argsort(-logits, axis=-1)
    likely = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    keep = jnp.take_along_axis(before < share, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)
