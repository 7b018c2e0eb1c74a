"""Supervised fine-tuning: the likelihood of the supervised tokens."""

from typing import Any

import jax.numpy as jnp

from jaxtune.config.schema import Config
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
from jaxtune.objectives.registry import register


@register("sft")
def build_sft(config: Config) -> Objective:
    """Build the objective, which has no settings."""
    return Objective(_loss)


def _loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
    return sft(models.policy, batch, options)


def sft(model: CausalLM, batch: Batch, options: ForwardOptions = DETERMINISTIC) -> Sums:
    """Return the sum of the token losses of a batch, in nats, and the sum of their weights."""
    hidden, head = hidden_and_head(model, batch, options)
    loss = linear_cross_entropy(
        hidden, head, batch.target_ids, batch.weights, model.config.logit_softcap
    )
    return Sums(loss, jnp.sum(batch.weights), {})
