"""Rematerialization policies by name: what is kept of a layer for the backward pass, and what is
computed again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt16

from jaxtune.core.hardware import platform

PROJECTION = "projection"
"""Name of the output of a linear layer, adapter included."""
LOW = "low_rank"
"""Name of an adapter's low-rank activation, a few numbers per token."""
LAYER = "layer"
"""Name of a layer's input."""
ATTENTION = "attention"
"""Name of the attention's output and of its softmax's normalizer."""
CUDNN = "dot_product_attention_fwd_wrapper"
"""JAX's primitive for cuDNN's attention; its results are the same two, and cannot be named."""


def named(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """Return x under a name that a policy may keep.

    On CPU a bfloat16 array is kept as sixteen-bit integers, since XLA would convert it to float32
    and back to store it.
    """
    return (
        _named_through_bits(name, x)
        if x.dtype == jnp.bfloat16 and platform() == "cpu"
        else checkpoint_name(x, name)
    )


def named_in_rule(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """Return x under a name like `named`, inside the forward rule of a custom derivative.

    Nothing is differentiated there, and a policy does not see names in a rule inside that rule.
    """
    return (
        _through_bits(name, x)
        if x.dtype == jnp.bfloat16 and platform() == "cpu"
        else checkpoint_name(x, name)
    )


def _through_bits(name: str, x: jax.Array) -> jax.Array:
    return as_float(checkpoint_name(as_bits(x), name))


_named_through_bits = jax.custom_vjp(_through_bits, nondiff_argnums=(0,))
_named_through_bits.defvjp(
    lambda name, x: (_through_bits(name, x), None), lambda name, _, dy: (dy,)
)


def as_bits(x: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """Return the bits of bfloat16 numbers."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def as_float(bits: UInt16[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Undo `as_bits`."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def remat(function: Callable, policy: str) -> Callable:
    """Apply a policy to a layer.

    Args:
        function: one layer's forward pass.
        policy: `none` keeps everything; `dots` keeps the results of linear layers and of the
            attention and recomputes what is cheap; `full` keeps only the layer's input; `offload`
            keeps the input in the host's memory.

    """
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    inputs = (LAYER,) if platform() == "cpu" else ()  # elsewhere an input is kept without a name
    by_name = policies.save_only_these_names(PROJECTION, LOW, ATTENTION, *inputs)
    keep = {
        "full": policies.nothing_saveable,
        "dots": policies.save_from_both_policies(
            by_name, lambda primitive, *_, **__: primitive.name == CUDNN
        ),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(function, policy=keep[policy], prevent_cse=False)
