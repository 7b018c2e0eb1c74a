"""Supervised fine-tuning: the likelihood of the supervised tokens."""

from typing import Any

import jax.numpy as jnp

from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.cross_entropy import linear_cross_entropy
from jaxtune.objectives.objective import PLAIN, Batch, Networks, Objective, Pass, Sums, read


def sft(model: CausalLM, batch: Batch, how: Pass = PLAIN) -> Sums:
    """`(sum of token losses, sum of weights, nothing)` of a batch."""
    hidden, head = read(model, batch, how)
    loss = linear_cross_entropy(hidden, head, batch.target_ids, batch.weights, model.config.logit_softcap)
    return loss, jnp.sum(batch.weights), {}


def _loss(networks: Networks, batch: Batch, how: Pass, shared: Any) -> Sums:
    return sft(networks.policy, batch, how)


SFT = Objective(_loss)
