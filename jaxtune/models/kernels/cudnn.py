"""Attention by cuDNN on NVIDIA GPUs, through JAX."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune.models.kernels.mask import Mask

_LONGEST = 8192  # tokens per row: the mask of segments has the square of them
_LARGEST_HEAD = 128


def supports_cudnn(q_BTNH: jax.Array, cap: float | None) -> bool:
    """Return whether cuDNN accepts such queries and this machine has a GPU for it."""
    tokens, size = q_BTNH.shape[1], q_BTNH.shape[3]
    fits = tokens % 2 == 0 and tokens <= _LONGEST and size % 8 == 0 and size <= _LARGEST_HEAD
    return fits and cap is None and q_BTNH.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"


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
    """Compute what `attend_blockwise` computes.

    `causal` says that queries and keys begin at the same token, so blocks in the future can be
    skipped.
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
