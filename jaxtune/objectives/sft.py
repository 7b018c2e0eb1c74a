"""Supervised fine-tuning: the likelihood of the supervised tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Dropout
from jaxtune.objectives.cross_entropy import linear_cross_entropy


class Batch(NamedTuple):
    """Rows of tokens, each holding one or several examples.

    Attributes:
        input_ids: tokens fed.
        target_ids: the token to predict at each position.
        weights: weight of that prediction; 0 where it is not supervised.
        segment_ids: number of the example in its row from 1; 0 is padding.
        positions: position in the example.

    """

    input_ids: Int[Any, "*cut batch seq"]
    target_ids: Int[Any, "*cut batch seq"]
    weights: Float[Any, "*cut batch seq"]
    segment_ids: Int[Any, "*cut batch seq"]
    positions: Int[Any, "*cut batch seq"]


def sft(
    model: CausalLM, batch: Batch, dropout: Dropout | None, remat_policy: str
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, jax.Array]]:
    """`(sum of token losses, sum of weights, further sums)` of a batch; nothing is divided here."""
    hidden, _ = model.hidden_states(
        batch.input_ids,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        dropout=dropout,
        remat_policy=remat_policy,
    )
    wide, head = model.head(hidden, dropout)
    flat = wide.reshape(-1, wide.shape[-1])
    targets, weights = batch.target_ids.reshape(-1), batch.weights.reshape(-1)
    loss = linear_cross_entropy(flat, head, targets, weights, model.config.logit_softcap)
    return loss, jnp.sum(batch.weights), {}
