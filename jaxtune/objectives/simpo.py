"""Simple preference optimization: the reward is the log-probability a token, and there is no
reference (Meng et al. 2024).
"""

from typing import Any

import jax

from jaxtune.data.batch import Batch
from jaxtune.objectives.dpo import pair_sums
from jaxtune.objectives.objective import ForwardOptions, Models, Objective, Sums
from jaxtune.objectives.sequence_log_probs import sequence_log_probs


def simpo(beta: float, margin: float, smoothing: float) -> Objective:
    """-log sigmoid(beta (log pi(c)/|c| - log pi(r)/|r|) - gamma), eq. 6, gamma being `margin`;
    smoothed as DPO is.
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        found = sequence_log_probs(models.policy, batch, options)
        chosen, rejected = found.pairs(beta * found.mean)
        z = chosen - rejected - margin
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z)
        return pair_sums(batch, losses, chosen - rejected)

    return Objective(loss)
