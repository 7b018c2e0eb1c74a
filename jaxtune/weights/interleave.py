"""The two row orders of rotary q and k: interleaved pairs (Meta, llama.cpp) and halves (Hugging
Face).
"""

import numpy as np

from jaxtune.weights.tensors import Index, LazyTensor


def half_split(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Reorder rows from interleaved rotary pairs to halves."""
    rows = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return _reordered(tensor, rows)


def interleaved(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Reorder rows from halves to interleaved rotary pairs."""
    rows = np.arange(tensor.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return _reordered(tensor, rows)


def _reordered(tensor: LazyTensor, rows: np.ndarray) -> LazyTensor:
    def read(index: Index) -> np.ndarray:
        return tensor.all()[rows][index]

    return LazyTensor(tensor.shape, tensor.dtype, read, tensor.quantized)
