"""Attention by cuDNN on NVIDIA GPUs, through JAX."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune.models.kernels.mask import Mask

_LONGEST = 8192  # tokens a row: the mask of segments is an array of the square of them
_LARGEST_HEAD = 128


def suits(q_BTNH: jax.Array, cap: float | None) -> bool:
    """Whether cuDNN takes such arrays, and whether this machine has it: it cannot be compiled
    for from elsewhere.
    """
    tokens, size = q_BTNH.shape[1], q_BTNH.shape[3]
    shaped = tokens % 2 == 0 and tokens <= _LONGEST and size % 8 == 0 and size <= _LARGEST_HEAD
    return (
        shaped and cap is None and q_BTNH.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    )


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    causal: bool,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """As `blockwise`; `causal` says that queries and keys begin at the same token, so that
    blocks of the future are passed over.
    """
    allowed = mask.allowed()[:, None]
    with jax.numpy_dtype_promotion("standard"):  # JAX's function raises bfloat16 to float32
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=allowed,
            scale=scale,
            is_causal=causal,
            implementation=implementation,
        )
