"""Kahneman-Tversky optimization: answers that are good or bad, each by itself (Ethayarajh et al.
2024).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config.schema import Config
from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED, Batch
from jaxtune.objectives.objective import DETERMINISTIC, ForwardOptions, Models, Objective, Sums
from jaxtune.objectives.registry import register
from jaxtune.objectives.sequence_log_probs import sequence_log_probs

BETA = 0.1


@register("kto")
def build_kto(config: Config) -> Objective:
    """Build the objective from the section `preference`."""
    section = config.preference
    return kto(section.beta or BETA, section.desirable_weight, section.undesirable_weight)


def kto(beta: float, desirable: float, undesirable: float) -> Objective:
    """Return the objective on labeled answers, eq. 8.

    With r = log pi(y)/ref(y), the loss of a good answer is w_d (1 - sigmoid(beta (r - z0))) and of
    a bad one w_u (1 - sigmoid(beta (z0 - r))), the weights being `desirable` and `undesirable`.

    z0 estimates the divergence of the model from the reference: the mean of r over prompts with
    another row's answer, at least zero, without a gradient. It is one number for the global batch,
    so it is computed before the first micro-batch.
    """

    def ratio(models: Models, batch: Batch, options: ForwardOptions) -> jax.Array:
        assert models.reference is not None
        return sequence_log_probs(models.policy, batch, options).total - jax.lax.stop_gradient(
            sequence_log_probs(models.reference, batch).total
        )

    def shared(models: Models, batch: Batch) -> tuple[jax.Array, jax.Array]:
        mismatched = (batch.labels == MISMATCHED).astype(jnp.float32)
        return jnp.sum(ratio(models, batch, DETERMINISTIC) * mismatched), jnp.sum(mismatched)

    def loss(models: Models, batch: Batch, options: ForwardOptions, divergence: Any) -> Sums:
        total, count = divergence
        zero = jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1.0), 0.0))
        good, bad = ((batch.labels == label).astype(jnp.float32) for label in (CHOSEN, REJECTED))
        margins = beta * (ratio(models, batch, options) - zero) * (good - bad)
        losses = (desirable * good + undesirable * bad) * (1 - jax.nn.sigmoid(margins))
        present = good + bad
        metrics = {
            "margin": jnp.sum(margins * present),
            "accuracy": jnp.sum(jnp.where(margins > 0, present, 0.0)),
        }
        return Sums(jnp.sum(losses), jnp.sum(present), metrics)

    return Objective(loss, has_reference=True, shared=shared, compares="labels")
