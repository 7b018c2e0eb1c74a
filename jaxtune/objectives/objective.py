"""What every objective shares: the models it may ask, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from jaxtune.data.batch import Batch
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Dropout


class Models(NamedTuple):
    """The model that trains; the one it started as, for objectives that ask for it; the teacher,
    likewise.
    """

    policy: CausalLM
    reference: CausalLM | None = None
    teacher: CausalLM | None = None


class ForwardOptions(NamedTuple):
    """How the model that trains is run: keys of its random numbers (None in evaluation),
    NEFTune's alpha, the remat policy.
    """

    dropout: Dropout | None = None
    noise: float = 0.0
    remat: str = "none"


DETERMINISTIC = ForwardOptions()
"""Nothing is random and nothing is recomputed, as in evaluation."""


def hidden_and_head(
    model: CausalLM, batch: Batch, options: ForwardOptions
) -> tuple[Float[Array, "batch seq embed"], Float[Array, "vocab embed"]]:
    """`(h, W)` over all tokens of a batch: the logits are h W^T, before a soft-cap."""
    hidden, _ = model.hidden_states(
        batch.input_ids,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        dropout=options.dropout,
        noise=options.noise,
        remat_policy=options.remat,
    )
    return model.head(hidden, options.dropout)


Sums = tuple[Float[Array, ""], Float[Array, ""], dict[str, jax.Array]]
"""Sum of the losses, sum of what it is divided by over the global batch, and sums of further
figures, divided likewise.
"""


@dataclass(frozen=True)
class Objective:
    """A method.

    Attributes:
        loss: `(models, batch, pass, shared)` to sums; nothing is divided there, so that no cut of a
            batch changes it.
        has_reference: whether it asks the model that training started from.
        shared: sums over the global batch that each part of it needs beforehand, by `(models,
            batch)`; None: nothing.

    """

    loss: Callable[[Models, Batch, ForwardOptions, Any], Sums]
    has_reference: bool = False
    shared: Callable[[Models, Batch], Any] | None = None
