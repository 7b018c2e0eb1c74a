"""The likelihood of answers after prompts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxtune.inference.engine import Engine
from jaxtune.inference.prefill import TokenIds
from jaxtune.inference.programs import Prefilled


class Likelihood(NamedTuple):
    """The log-probability of each candidate after one prompt, in nats.

    `greedy` says whether greedy decoding gives it.
    """

    log_probs: Float[np.ndarray, " candidates"]
    greedy: Bool[np.ndarray, " candidates"]


def likelihoods(
    engine: Engine,
    prompts: Sequence[TokenIds],
    candidates: Sequence[Sequence[TokenIds]],
    *,
    room: int = 0,
    then: Callable[[Sequence[int], Prefilled], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """Compute how likely each candidate is after its prompt.

    Each prompt is read once; those of about one length go together.

    Args:
        engine: the model.
        prompts: ids of each prompt.
        candidates: for each prompt the ids of what may follow, any number, none empty.
        room: tokens that `then` needs behind the prompts.
        then: called with the numbers of prompts that were read together and the cache that holds
            them, which it may use up.
        progress: called with the number of prompts done, and of all.

    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    results = [
        Likelihood(np.zeros(len(options)), np.zeros(len(options), bool)) for options in candidates
    ]
    for start in range(0, len(order), engine.batch):
        part = order[start : start + engine.batch]
        longest = max(len(tokens) for number in part for tokens in candidates[number])
        prefilled = engine.prefill([prompts[number] for number in part], max(longest, room))
        for column in range(max(len(candidates[number]) for number in part)):
            tokens = [
                candidates[number][column] if column < len(candidates[number]) else ()
                for number in part
            ]
            sums, same = engine.score(prefilled, tokens)
            for row, number in enumerate(part):
                if column < len(candidates[number]):
                    results[number].log_probs[column], results[number].greedy[column] = (
                        sums[row],
                        same[row],
                    )
        if then:
            then(part, prefilled)
        if progress:
            progress(start + len(part), len(prompts))
    return results
