"""What every objective shares: the models it runs, the options of a pass, the sums it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from jaxtune.data.batch import Batch
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Dropout


class Models(NamedTuple):
    """The models an objective may run.

    Attributes:
        policy: the model that trains.
        reference: the same model as training began, for objectives with a reference.
        teacher: the model to distill from, if there is one.

    """

    policy: CausalLM
    reference: CausalLM | None = None
    teacher: CausalLM | None = None


class ForwardOptions(NamedTuple):
    """How the model that trains is run.

    Attributes:
        dropout: keys of the random numbers; None in evaluation.
        noise: NEFTune's alpha.
        remat: the remat policy; see `models.remat`.

    """

    dropout: Dropout | None = None
    noise: float = 0.0
    remat: str = "none"


DETERMINISTIC = ForwardOptions()
"""Nothing is random and nothing is recomputed, as in evaluation."""


class Sums(NamedTuple):
    """What an objective returns for a part of the global batch.

    Nothing is divided here: the sums over all parts are divided once, by the global weight, so the
    result does not depend on how the batch is split.

    Attributes:
        loss: sum of the losses.
        weight: what all sums are divided by in the end, such as the number of supervised tokens.
        metrics: sums of further metrics by name, to be divided by the same weight.

    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, jax.Array]


@dataclass(frozen=True)
class Objective:
    """What training minimizes.

    Attributes:
        loss: a function `(models, batch, options, shared) -> Sums`.
        has_reference: whether it uses `models.reference`.
        shared: a function `(models, batch)` whose sum over the global batch every call of `loss`
            needs and receives as `shared`; None: there is nothing of the kind.
        compares: what it compares: two answers to one prompt (`pairs`), or answers that are marked
            good or bad (`labels`); None: no answers.

    """

    loss: Callable[[Models, Batch, ForwardOptions, Any], Sums]
    has_reference: bool = False
    shared: Callable[[Models, Batch], Any] | None = None
    compares: Literal["pairs", "labels"] | None = None


def hidden_and_head(
    model: CausalLM, batch: Batch, options: ForwardOptions
) -> tuple[Float[Array, "batch seq embed"], Float[Array, "vocab embed"]]:
    """Return `(h, W)` for all tokens of a batch: the logits are h W^T, before a soft-cap."""
    hidden, _ = model.hidden_states(
        batch.input_ids,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        dropout=options.dropout,
        noise=options.noise,
        remat_policy=options.remat,
    )
    return model.head(hidden, options.dropout)
