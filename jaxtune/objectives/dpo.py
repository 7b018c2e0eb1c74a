"""Direct preference optimization (Rafailov et al. 2023), its label-smoothed form (Mitchell 2023)
and IPO (Azar et al. 2023).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.batch import CHOSEN, Batch
from jaxtune.objectives.objective import ForwardOptions, Models, Objective, Sums
from jaxtune.objectives.sequence_log_probs import sequence_log_probs


def dpo(beta: float, kind: str, smoothing: float) -> Objective:
    """The objective over pairs.

    With z = log pi(c)/ref(c) - log pi(r)/ref(r): -(1 - e) log sigmoid(beta z) - e log sigmoid(-beta
    z), e the smoothing; for `ipo` (z - 1 / (2 beta))^2, the log-probabilities taken a token.
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        assert models.reference is not None
        ours, theirs = (
            sequence_log_probs(models.policy, batch, options),
            jax.lax.stop_gradient(sequence_log_probs(models.reference, batch)),
        )
        ratio = ours.mean - theirs.mean if kind == "ipo" else ours.total - theirs.total
        chosen, rejected = ours.pairs(ratio)
        z = chosen - rejected
        if kind == "ipo":
            losses = jnp.square(z - 1 / (2 * beta))
        else:
            losses = -(1 - smoothing) * jax.nn.log_sigmoid(
                beta * z
            ) - smoothing * jax.nn.log_sigmoid(-beta * z)
        return pair_sums(batch, losses, beta * z)

    return Objective(loss, has_reference=True)


def pair_sums(batch: Batch, losses: jax.Array, margin: jax.Array) -> Sums:
    """The sums over the pairs that are there; `margin` is by how much the chosen answer's reward
    exceeds the other's.
    """
    assert batch.labels is not None
    there = (batch.labels[:, ::2] == CHOSEN).astype(jnp.float32)
    figures = {
        "margin": jnp.sum(margin * there),
        "accuracy": jnp.sum(jnp.where(margin > 0, there, 0.0)),
    }
    return jnp.sum(losses * there), jnp.sum(there), figures
