"""What objectives on pairs of answers share: how a pair lies in a batch, and its sums."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune.data.batch import CHOSEN, Batch
from jaxtune.objectives.objective import Sums


def split_pairs(
    values: Float[Array, "batch segments"],
) -> tuple[Float[Array, "batch pairs"], Float[Array, "batch pairs"]]:
    """Split values of segments into those of the chosen answers (the segments 1, 3, 5 ...) and of
    the rejected ones (2, 4, 6 ...).
    """
    return values[:, ::2], values[:, 1::2]


def sum_pairs(
    batch: Batch, losses: Float[Array, "batch pairs"], margins: Float[Array, "batch pairs"]
) -> Sums:
    """Sum the losses of the pairs that a batch holds, with the metrics `margin` and `accuracy`.

    Args:
        batch: rows of pairs, some with fewer than others.
        losses: a loss per pair.
        margins: the reward of the chosen answer less that of the rejected one.

    """
    assert batch.labels is not None
    present = (batch.labels[:, ::2] == CHOSEN).astype(jnp.float32)
    metrics = {
        "margin": jnp.sum(margins * present),
        "accuracy": jnp.sum(jnp.where(margins > 0, present, 0.0)),
    }
    return Sums(jnp.sum(losses * present), jnp.sum(present), metrics)
