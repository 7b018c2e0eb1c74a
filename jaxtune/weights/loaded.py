"""A model ready for use, with what belongs to it."""

from dataclasses import dataclass

from jaxtune.core.errors import UserError
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.models.decoder import CausalLM
from jaxtune.weights.source import Source


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use.

    Attributes:
        model: the model, with its adapter if it has one.
        tokenizer: None where the model comes without.
        stop_ids: tokens that end an answer.
        source: where the base comes from; None for a pair that was passed in.

    """

    model: CausalLM
    tokenizer: Tokenizer | None
    stop_ids: list[int]
    source: Source | None

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            UserError: the model comes without.

        """
        if self.tokenizer is None:
            raise UserError(
                "The model has no tokenizer, which this needs. Put its tokenizer files beside the "
                "weights."
            )
        return self.tokenizer
