"""Names of number formats, and what 'auto' means on this machine."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import UserError, listed

DTYPES: dict[str, np.dtype] = {
    "float32": jnp.dtype(jnp.float32),
    "bfloat16": jnp.dtype(jnp.bfloat16),
    "float16": jnp.dtype(jnp.float16),
}


def compute_dtype(name: str) -> np.dtype:
    """The dtype of activations and matrix products: 'auto' is bfloat16 on accelerators, float32
    on CPU.
    """
    if name != "auto":
        return _named(name)
    return DTYPES["float32" if jax.default_backend() == "cpu" else "bfloat16"]


def storage_dtype(name: str, found: np.dtype, quantized: bool) -> np.dtype:
    """The dtype a frozen weight is kept in.

    Args:
        name: the `model.dtype` key; 'auto' keeps what the file has.
        found: the dtype in the file.
        quantized: whether the file held a block-quantized tensor, which 'auto' keeps at the compute
            precision.

    """
    if name != "auto":
        return _named(name)
    return compute_dtype("auto") if quantized else found


def _named(name: str) -> np.dtype:
    if name not in DTYPES:
        raise UserError(
            f"The dtype {name!r} is not supported; supported are auto, {listed(DTYPES)}."
        )
    return DTYPES[name]


def precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """What a matrix product of this dtype is computed with: float32 means float32 on every
    platform, not TF32 or bfloat16 passes.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
