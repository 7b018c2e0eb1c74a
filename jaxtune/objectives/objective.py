"""What every objective shares: the batch, the networks it may ask, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Dropout

CHOSEN, REJECTED, MISMATCHED = 1, 2, 3
"""What an answer is: preferred or good; rejected or bad; another row's answer to this prompt."""


class Batch(NamedTuple):
    """Rows of tokens, each holding one or several examples.

    Attributes:
        input_ids: tokens fed.
        target_ids: the token to predict at each position.
        weights: weight of that prediction; 0 where it is not supervised.
        segment_ids: number of the example in its row from 1; 0 is padding.
        positions: position in the example.
        labels: for the segments 1, 2, ... of a row what its answer is, 0 where there is no such segment; two answers to one prompt
            are the segments 2k - 1 and 2k. None where no answer is compared with another.

    """

    input_ids: Int[Any, "*cut batch seq"]
    target_ids: Int[Any, "*cut batch seq"]
    weights: Float[Any, "*cut batch seq"]
    segment_ids: Int[Any, "*cut batch seq"]
    positions: Int[Any, "*cut batch seq"]
    labels: Int[Any, "*cut batch segments"] | None = None


class Networks(NamedTuple):
    """The model that trains; the one it started as, for objectives that ask for it; the teacher, likewise."""

    policy: CausalLM
    reference: CausalLM | None = None
    teacher: CausalLM | None = None


class Pass(NamedTuple):
    """How the model that trains is run: keys of its random numbers (None in evaluation), NEFTune's alpha, the remat policy."""

    dropout: Dropout | None = None
    noise: float = 0.0
    remat: str = "none"


PLAIN = Pass()
"""Nothing is random and nothing is recomputed, as in evaluation."""


def read(model: CausalLM, batch: Batch, how: Pass) -> tuple[Float[Array, "batch seq embed"], Float[Array, "vocab embed"]]:
    """`(h, W)` over all tokens of a batch: the logits are h W^T, before a soft-cap."""
    hidden, _ = model.hidden_states(
        batch.input_ids,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        dropout=how.dropout,
        noise=how.noise,
        remat_policy=how.remat,
    )
    return model.head(hidden, how.dropout)


Sums = tuple[Float[Array, ""], Float[Array, ""], dict[str, jax.Array]]
"""Sum of the losses, sum of what it is divided by over the global batch, and sums of further figures, divided likewise."""


@dataclass(frozen=True)
class Objective:
    """A method.

    Attributes:
        loss: `(networks, batch, pass, shared)` to sums; nothing is divided there, so that no cut of a batch changes it.
        has_reference: whether it asks the model that training started from.
        shared: sums over the global batch that each part of it needs beforehand, by `(networks, batch)`; None: nothing.

    """

    loss: Callable[[Networks, Batch, Pass, Any], Sums]
    has_reference: bool = False
    shared: Callable[[Networks, Batch], Any] | None = None
