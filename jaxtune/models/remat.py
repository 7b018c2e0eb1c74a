"""Named policies of what the backward pass keeps of a layer and what it computes again."""

from collections.abc import Callable

import jax

from jaxtune.core.platforms import platform

PROJECTION = "projection"
"""Name of the output of a linear layer, adapter included."""
LOW = "low_rank"
"""Name of an adapter's inner product, a few numbers per token."""
LAYER = "layer"
"""Name of a layer's input."""
ATTENTION = "attention"
"""Name of the attention's output and of its softmax's normaliser."""


def remat(function: Callable, policy: str) -> Callable:
    """The layer function under a policy.

    Args:
        function: one layer's forward pass.
        policy: `none` keeps everything; `dots` keeps the results of linear layers and of the attention and recomputes
            what is cheap; `full` keeps only the layer's input; `offload` keeps that in the memory of the host, where a platform has
            one beside its own.

    """
    if policy == "none":
        return function
    names = jax.checkpoint_policies
    keep = {
        "full": names.nothing_saveable,
        "dots": names.save_only_these_names(PROJECTION, LOW, ATTENTION),
        "offload": names.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER], offload_src="device", offload_dst="pinned_host"
        ),
    }
    if policy == "offload" and platform() == "cpu":
        policy = "full"
    return jax.checkpoint(function, policy=keep[policy], prevent_cse=False)
