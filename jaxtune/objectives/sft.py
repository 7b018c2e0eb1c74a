"""Supervised fine-tuning: the likelihood of the supervised tokens."""

from typing import Any

import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.cross_entropy import linear_cross_entropy
from jaxtune.objectives.objective import (
    DETERMINISTIC,
    ForwardOptions,
    Models,
    Objective,
    Sums,
    hidden_and_head,
)


def sft(model: CausalLM, batch: Batch, options: ForwardOptions = DETERMINISTIC) -> Sums:
    """`(sum of token losses, sum of weights, nothing)` of a batch."""
    hidden, head = hidden_and_head(model, batch, options)
    loss = linear_cross_entropy(
        hidden, head, batch.target_ids, batch.weights, model.config.logit_softcap
    )
    return loss, jnp.sum(batch.weights), {}


def _loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
    return sft(models.policy, batch, options)


SFT = Objective(_loss)
