"""Named policies of what the backward pass keeps of a layer and what it computes again."""

from collections.abc import Callable

import jax


def remat(function: Callable, policy: str) -> Callable:
    """The layer function under a policy.

    Args:
        function: one layer's forward pass.
        policy: `none` keeps everything; `dots` keeps the results of matrix products with weights and recomputes
            the rest; `full` keeps only the layer's input.
    """
    if policy == "none":
        return function
    keep = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return jax.checkpoint(function, policy=keep[policy], prevent_cse=False)
