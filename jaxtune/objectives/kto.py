"""Kahneman-Tversky optimization: answers that are good or bad, each by itself (Ethayarajh et al.
2024).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED, Batch
from jaxtune.objectives.objective import DETERMINISTIC, ForwardOptions, Models, Objective, Sums
from jaxtune.objectives.sequence_log_probs import sequence_log_probs


def kto(beta: float, desirable: float, undesirable: float) -> Objective:
    """W (1 - sigmoid(beta (r - z0))) for good answers, w (1 - sigmoid(beta (z0 - r))) for bad ones,
    eq. 8; r = log pi(y)/ref(y).

    z0, the distance of the model from the reference, is the mean of r over answers of other rows,
    not below zero and no part of the gradient. It is one number for the global batch, so it is
    computed before the first part of it.
    """

    def ratio(models: Models, batch: Batch, options: ForwardOptions) -> jax.Array:
        assert models.reference is not None
        return sequence_log_probs(models.policy, batch, options).total - jax.lax.stop_gradient(
            sequence_log_probs(models.reference, batch).total
        )

    def shared(models: Models, batch: Batch) -> tuple[jax.Array, jax.Array]:
        others = (batch.labels == MISMATCHED).astype(jnp.float32)
        return jnp.sum(ratio(models, batch, DETERMINISTIC) * others), jnp.sum(others)

    def loss(models: Models, batch: Batch, options: ForwardOptions, distance: Any) -> Sums:
        total, count = distance
        zero = jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1.0), 0.0))
        good, bad = ((batch.labels == label).astype(jnp.float32) for label in (CHOSEN, REJECTED))
        signed = beta * (ratio(models, batch, options) - zero) * (good - bad)
        losses = (desirable * good + undesirable * bad) * (1 - jax.nn.sigmoid(signed))
        there = good + bad
        figures = {
            "margin": jnp.sum(signed * there),
            "accuracy": jnp.sum(jnp.where(signed > 0, there, 0.0)),
        }
        return jnp.sum(losses), jnp.sum(there), figures

    return Objective(loss, has_reference=True, shared=shared)
