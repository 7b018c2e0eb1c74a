"""What every weight reader yields: named tensors that are read only where and when they are asked for."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
        shape: its shape, as Hugging Face lays it out.
        dtype: the dtype in which `read` returns it.
        read: reads the part that an index of slices names.
        quantised: whether the file holds it in blocks of few bits; `read` de-quantises.

    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    quantised: bool = False

    def all(self) -> np.ndarray:
        """The whole tensor."""
        return self.read(tuple(slice(0, size) for size in self.shape))


Tensors = dict[str, LazyTensor]
