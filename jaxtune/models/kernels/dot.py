"""The matrix products of layers, forward and backward, with the precision and accumulation that
suit each platform.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune.core.dtypes import precision
from jaxtune.core.hardware import platform
from jaxtune.core.sharding import is_multi_device


def dot(
    x: Float[Array, "*batch inner"], matrix: Float[Array, "..."], axis: int
) -> Float[Array, "*batch outer"]:
    """Contract x's last axis with the matrix's `axis`, in x's dtype; float32 means float32 on every
    platform.

    On CPU a bfloat16 product is returned in float32 and then rounded, as accelerators do
    internally: XLA has fast code for this form only.
    """
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    wide = jnp.float32 if x.dtype == jnp.bfloat16 and platform() == "cpu" else None
    product = jax.lax.dot_general(
        x, matrix.astype(x.dtype), dims, precision=precision(x.dtype), preferred_element_type=wide
    )
    return product.astype(x.dtype)


def weight_grad(
    left: Float[Array, "*batch outer"], right: Float[Array, "*batch inner"]
) -> Float[Array, "outer inner"]:
    """Sum the outer products of all tokens, in float32: the gradient of a matrix."""
    # On a mesh batch and tokens may be sharded over different axes, so they are not merged into
    # one.
    if not is_multi_device():
        left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    tokens = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(
        left,
        right,
        ((tokens, tokens), ((), ())),
        precision=precision(left.dtype),
        preferred_element_type=jnp.float32,
    )
