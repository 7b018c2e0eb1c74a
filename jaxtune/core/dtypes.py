"""The dtypes by name, and what 'auto' means on this machine."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import UserError, listed

DTYPES: dict[str, np.dtype] = {
    "float32": jnp.dtype(jnp.float32),
    "bfloat16": jnp.dtype(jnp.bfloat16),
    "float16": jnp.dtype(jnp.float16),
}

AUTO = {"cpu": "float32", "gpu": "bfloat16", "tpu": "bfloat16"}
"""What `auto` means for activations and matrix products, by JAX's name of the platform."""


def compute_dtype(name: str) -> np.dtype:
    """Return the dtype of activations and matrix products: 'auto' is bfloat16 on accelerators,
    float32 on CPU.
    """
    if name != "auto":
        return _named(name)
    return DTYPES[AUTO[jax.default_backend()]]


def storage_dtype(name: str, file_dtype: np.dtype, quantized: bool) -> np.dtype:
    """Return the dtype in which a frozen weight is stored.

    Args:
        name: the `model.dtype` key; 'auto' keeps the file's dtype.
        file_dtype: the dtype in the file.
        quantized: whether the tensor is block-quantized in the file; 'auto' then stores it in the
            compute dtype.

    """
    if name != "auto":
        return _named(name)
    return compute_dtype("auto") if quantized else file_dtype


def _named(name: str) -> np.dtype:
    if name not in DTYPES:
        raise UserError(
            f"The dtype {name!r} is not supported; supported are auto, {listed(DTYPES)}."
        )
    return DTYPES[name]


def precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """Return the precision of matrix products of this dtype: float32 is computed as float32 on
    every platform, not in TF32 or bfloat16 passes.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
