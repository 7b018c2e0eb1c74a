"""Odds-ratio preference optimization: supervised training and a preference in one, without a
reference (Hong et al. 2024).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.objectives.dpo import pair_sums
from jaxtune.objectives.objective import ForwardOptions, Models, Objective, Sums
from jaxtune.objectives.sequence_log_probs import sequence_log_probs


def orpo(beta: float) -> Objective:
    """-log p(c) - beta log sigmoid(log odds(c) - log odds(r)), eq. 6 and 7, p being a token's
    mean probability and odds p / (1 - p).
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        found = sequence_log_probs(models.policy, batch, options)
        chosen, rejected = found.pairs(
            jnp.minimum(found.mean, -1e-6)
        )  # of an answer that is certain the odds are infinite
        odds = (chosen - _log_complement(chosen)) - (rejected - _log_complement(rejected))
        return pair_sums(
            batch, -chosen - beta * jax.nn.log_sigmoid(odds), beta * (chosen - rejected)
        )

    return Objective(loss)


def _log_complement(log_p: jax.Array) -> jax.Array:
    """log(1 - p), exact near p = 1."""
    return jnp.log(-jnp.expm1(log_p))
