"""Named policies of what the backward pass keeps of a layer and what it computes again."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt16

from jaxtune.core.hardware import platform

PROJECTION = "projection"
"""Name of the output of a linear layer, adapter included."""
LOW = "low_rank"
"""Name of an adapter's inner product, a few numbers per token."""
LAYER = "layer"
"""Name of a layer's input."""
ATTENTION = "attention"
"""Name of the attention's output and of its softmax's normalizer."""
CUDNN = "dot_product_attention_fwd_wrapper"
"""JAX's own primitive of cuDNN's attention: to its results, which are these two, no name can be
given.
"""


def named(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """X, which a policy may keep by this name.

    On CPU a bfloat16 array is kept as integers of sixteen bits: XLA would take it to float32 and
    back to put it in its place.
    """
    return (
        _named_through_bits(name, x)
        if x.dtype == jnp.bfloat16 and platform() == "cpu"
        else checkpoint_name(x, name)
    )


def named_in_rule(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """Like `named`, within a forward rule: nothing is differentiated there, and a policy does
    not see a name within a rule's rule.
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
    """The bits of bfloat16 numbers."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def as_float(bits: UInt16[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The inverse of `as_bits`."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def remat(function: Callable, policy: str) -> Callable:
    """The layer function under a policy.

    Args:
        function: one layer's forward pass.
        policy: `none` keeps everything; `dots` keeps the results of linear layers and of the
            attention and recomputes what is cheap; `full` keeps only the layer's input; `offload`
            keeps that in the memory of the host.

    """
    if policy == "none":
        return function
    policies, inputs = (
        jax.checkpoint_policies,
        (LAYER,) if platform() == "cpu" else (),
    )  # elsewhere an input is kept unnamed
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
