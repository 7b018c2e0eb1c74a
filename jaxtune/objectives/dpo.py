"""Direct preference optimization (Rafailov et al. 2023), its label-smoothed form (Mitchell 2023)
and IPO (Azar et al. 2023).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config.schema import Config
from jaxtune.data.batch import Batch
from jaxtune.objectives.objective import ForwardOptions, Models, Objective, Sums
from jaxtune.objectives.pairs import split_pairs, sum_pairs
from jaxtune.objectives.registry import register
from jaxtune.objectives.sequence_log_probs import sequence_log_probs

BETA = 0.1


@register("dpo")
def build_dpo(config: Config) -> Objective:
    """Build the objective from the section `preference`."""
    section = config.preference
    return dpo(section.beta or BETA, section.dpo_loss, section.label_smoothing)


def dpo(beta: float, kind: str, smoothing: float) -> Objective:
    """Return the objective on pairs.

    With z = log pi(c)/ref(c) - log pi(r)/ref(r) and e the smoothing, the loss of a pair is
    -(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z). For the kind `ipo` it is
    (z - 1 / (2 beta))^2, and log-probabilities are means over an answer's tokens.
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        assert models.reference is not None
        policy, reference = (
            sequence_log_probs(models.policy, batch, options),
            jax.lax.stop_gradient(sequence_log_probs(models.reference, batch)),
        )
        ratio = policy.mean - reference.mean if kind == "ipo" else policy.total - reference.total
        chosen, rejected = split_pairs(ratio)
        z = chosen - rejected
        if kind == "ipo":
            losses = jnp.square(z - 1 / (2 * beta))
        else:
            losses = -(1 - smoothing) * jax.nn.log_sigmoid(
                beta * z
            ) - smoothing * jax.nn.log_sigmoid(-beta * z)
        return sum_pairs(batch, losses, beta * z)

    return Objective(loss, has_reference=True, compares="pairs")
