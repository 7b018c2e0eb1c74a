"""Named policies of what the backward pass keeps of a layer and what it computes again."""

from collections.abc import Callable

import jax

PROJECTION = "projection"
"""Name of the output of a linear layer, adapter included."""
LOW = "low_rank"
"""Name of an adapter's inner product, a few numbers per token."""
ATTENTION = "attention"
"""Name of the attention's output and of its softmax's normaliser."""


def remat(function: Callable, policy: str) -> Callable:
    """The layer function under a policy.

    Args:
        function: one layer's forward pass.
        policy: `none` keeps everything; `dots` keeps the results of linear layers and of the attention and recomputes
            what is cheap; `full` keeps only the layer's input.

    """
    if policy == "none":
        return function
    keep = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION, LOW, ATTENTION),
    }
    return jax.checkpoint(function, policy=keep[policy], prevent_cse=False)
