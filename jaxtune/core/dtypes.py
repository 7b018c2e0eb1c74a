"""Names of number formats, and what 'auto' means on this machine."""

import jax
import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "float32": jnp.dtype(jnp.float32),
    "bfloat16": jnp.dtype(jnp.bfloat16),
    "float16": jnp.dtype(jnp.float16),
}


def compute_dtype(name: str) -> np.dtype:
    """The dtype of activations and matrix products: 'auto' is bfloat16 on accelerators, float32 on CPU."""
    if name != "auto":
        return DTYPES[name]
    return DTYPES["float32" if jax.default_backend() == "cpu" else "bfloat16"]


def storage_dtype(name: str, found: np.dtype, quantised: bool) -> np.dtype:
    """The dtype a frozen weight is kept in.

    Args:
        name: the `model.dtype` key; 'auto' keeps what the file has.
        found: the dtype in the file.
        quantised: whether the file held a block-quantised tensor, which 'auto' keeps at the compute precision.

    """
    if name != "auto":
        return DTYPES[name]
    return compute_dtype("auto") if quantised else found


def precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """What a matrix product of this dtype is computed with: float32 means float32 on every platform, not TF32 or bfloat16 passes."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
