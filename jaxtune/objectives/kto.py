"""Kahneman-Tversky optimisation: answers that are good or bad, each by itself (Ethayarajh et al. 2024)."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.objectives.objective import CHOSEN, MISMATCHED, PLAIN, REJECTED, Batch, Networks, Objective, Pass, Sums
from jaxtune.objectives.sequence_log_probs import answers


def kto(beta: float, desirable: float, undesirable: float) -> Objective:
    """W (1 - sigmoid(beta (r - z0))) for good answers, w (1 - sigmoid(beta (z0 - r))) for bad ones, eq. 8; r = log pi(y)/ref(y).

    z0, the distance of the model from the reference, is the mean of r over answers of other rows, not below zero and no part of the
    gradient. It is one number for the global batch, so it is computed before the first part of it.
    """

    def ratio(networks: Networks, batch: Batch, how: Pass) -> jax.Array:
        assert networks.reference is not None
        return answers(networks.policy, batch, how).total - jax.lax.stop_gradient(answers(networks.reference, batch).total)

    def shared(networks: Networks, batch: Batch) -> tuple[jax.Array, jax.Array]:
        others = (batch.labels == MISMATCHED).astype(jnp.float32)
        return jnp.sum(ratio(networks, batch, PLAIN) * others), jnp.sum(others)

    def loss(networks: Networks, batch: Batch, how: Pass, distance: Any) -> Sums:
        total, count = distance
        zero = jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1.0), 0.0))
        good, bad = ((batch.labels == label).astype(jnp.float32) for label in (CHOSEN, REJECTED))
        signed = beta * (ratio(networks, batch, how) - zero) * (good - bad)
        losses = (desirable * good + undesirable * bad) * (1 - jax.nn.sigmoid(signed))
        there = good + bad
        figures = {"margin": jnp.sum(signed * there), "accuracy": jnp.sum(jnp.where(signed > 0, there, 0.0))}
        return jnp.sum(losses), jnp.sum(there), figures

    return Objective(loss, has_reference=True, shared=shared)
