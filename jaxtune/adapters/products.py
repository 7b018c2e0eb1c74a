"""The products of a low-rank update, with gradients written out."""

from functools import partial

import jax
from jaxtyping import Array, Float

from jaxtune.models.kernels.dot import weight_grad
from jaxtune.models.kernels.quantized import Axes, QuantizedTensor
from jaxtune.models.layers import matmul, matmul_back
from jaxtune.models.remat import LOW, named_in_rule


@jax.custom_vjp
def low_rank(
    x: Float[Array, "*batch in"], a: Float[Array, "rank in"], b: Float[Array, "out rank"]
) -> Float[Array, "*batch out"]:
    """Return (x A^T) B^T, the products in x's dtype, the gradients of A and B in float32.

    The backward pass is written out so that the gradient of B is a product with the thin side
    transposed; derived, it would transpose the gradient of the output, the widest array of the
    layer.
    """
    return matmul(matmul(x, a), b)


def _low_rank_fwd(x, a, b):
    low = named_in_rule(matmul(x, a), LOW)
    return matmul(low, b), (x, low, a, b)


def _low_rank_bwd(residuals, dy):
    dlow, da, db = _factors_back(residuals, dy)
    return matmul_back(dlow, residuals[2]), da, db


def _factors_back(
    residuals: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, low, _, b = residuals
    dlow = matmul_back(dy, b)
    # The barrier keeps the thin side first; XLA would fold the transposition into the product,
    # which on CPU is then far slower.
    return dlow, weight_grad(dlow, x), jax.lax.optimization_barrier(weight_grad(low, dy)).T


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted_product(
    axes: Axes,
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"] | QuantizedTensor,
    a: Float[Array, "rank in"],
    b: Float[Array, "out rank"],
) -> Float[Array, "*batch out"]:
    """Return x W^T + (x A^T) B^T with a frozen W of logical `axes`.

    The backward pass is through with x before it makes x's gradient, so that these two, which may
    be the widest arrays of a layer, are not there at the same time.
    """
    return matmul(x, weight, axes) + low_rank(x, a, b)


def _adapted_fwd(axes, x, weight, a, b):
    update, residuals = _low_rank_fwd(x, a, b)
    return matmul(x, weight, axes) + update, (weight, *residuals)


def _adapted_bwd(axes, residuals, dy):
    weight, *rest = residuals
    dlow, da, db = _factors_back(tuple(rest), dy)
    dlow, da, dy = jax.lax.optimization_barrier((dlow, da, dy))
    return matmul_back(dy, weight, axes) + matmul_back(dlow, rest[2]), None, da, db


adapted_product.defvjp(_adapted_fwd, _adapted_bwd)
