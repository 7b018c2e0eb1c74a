"""Simple preference optimization: the reward is the log-probability per token, and there is no
reference (Meng et al. 2024).
"""

from typing import Any

import jax

from jaxtune.config.schema import Config
from jaxtune.data.batch import Batch
from jaxtune.objectives.objective import ForwardOptions, Models, Objective, Sums
from jaxtune.objectives.pairs import split_pairs, sum_pairs
from jaxtune.objectives.registry import register
from jaxtune.objectives.sequence_log_probs import sequence_log_probs

BETA = 2.0


@register("simpo")
def build_simpo(config: Config) -> Objective:
    """Build the objective from the section `preference`."""
    section = config.preference
    return simpo(section.beta or BETA, section.margin, section.label_smoothing)


def simpo(beta: float, margin: float, smoothing: float) -> Objective:
    """Return the objective on pairs, eq. 6.

    The loss of a pair is -log sigmoid(beta (log pi(c)/|c| - log pi(r)/|r|) - gamma), where gamma is
    `margin`; it is smoothed as in DPO.
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        log_probs = sequence_log_probs(models.policy, batch, options)
        chosen, rejected = split_pairs(beta * log_probs.mean)
        z = chosen - rejected - margin
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z)
        return sum_pairs(batch, losses, chosen - rejected)

    return Objective(loss, compares="pairs")
