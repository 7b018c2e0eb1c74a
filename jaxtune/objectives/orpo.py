"""Odds-ratio preference optimization: supervised training and a preference in one, without a
reference (Hong et al. 2024).
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
_LARGEST_LOG_P = -1e-6  # the odds of an answer that is certain would be infinite


@register("orpo")
def build_orpo(config: Config) -> Objective:
    """Build the objective from the section `preference`."""
    return orpo(config.preference.beta or BETA)


def orpo(beta: float) -> Objective:
    """Return the objective on pairs, eq. 6 and 7.

    The loss of a pair is -log p(c) - beta log sigmoid(log odds(c) - log odds(r)), where p is the
    mean probability of an answer's tokens (the geometric mean) and odds are p / (1 - p).
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        log_probs = sequence_log_probs(models.policy, batch, options)
        chosen, rejected = split_pairs(jnp.minimum(log_probs.mean, _LARGEST_LOG_P))
        odds = (chosen - _log_complement(chosen)) - (rejected - _log_complement(rejected))
        losses = -chosen - beta * jax.nn.log_sigmoid(odds)
        return sum_pairs(batch, losses, beta * (chosen - rejected))

    return Objective(loss, compares="pairs")


def _log_complement(log_p: jax.Array) -> jax.Array:
    """Return log(1 - p), exact near p = 1."""
    return jnp.log(-jnp.expm1(log_p))
