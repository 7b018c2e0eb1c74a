"""A batch: rows of tokens, each holding one or several examples."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int

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
        labels: for the segments 1, 2, ... of a row what its answer is, 0 where there is no such
            segment; two answers to one prompt are the segments 2k - 1 and 2k. None where no answer
            is compared with another.

    """

    input_ids: Int[Any, "*micro batch seq"]
    target_ids: Int[Any, "*micro batch seq"]
    weights: Float[Any, "*micro batch seq"]
    segment_ids: Int[Any, "*micro batch seq"]
    positions: Int[Any, "*micro batch seq"]
    labels: Int[Any, "*micro batch segments"] | None = None
