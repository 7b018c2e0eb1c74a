"""Tensors in files: a tensor is read only when and where its numbers are needed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Index = tuple[slice, ...]
_BLOCK_BYTES = 1 << 28


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read on demand.

    Attributes:
        shape: its shape, as Hugging Face lays it out.
        dtype: the dtype in which `read` returns it.
        read: returns the part that an index of slices selects.
        quantized: whether the file stores it in blocks of few bits; `read` de-quantizes.
        file: where it lies, for messages.

    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    quantized: bool = False
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        """Return the size of the numbers in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the whole tensor in order, in runs of rows of a bounded size."""
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        step = max(1, _BLOCK_BYTES // max(row, 1))
        rest = tuple(slice(0, size) for size in self.shape[1:])
        for start in range(0, self.shape[0], step) if self.shape else ():
            yield np.ascontiguousarray(
                self.read((slice(start, min(start + step, self.shape[0])), *rest))
            )

    def astype(self, dtype: np.dtype) -> "LazyTensor":
        """Return the tensor, rounded to a dtype as it is read."""
        return (
            self
            if dtype == self.dtype
            else LazyTensor(
                self.shape, dtype, lambda index: self.read(index).astype(dtype), file=self.file
            )
        )

    def all(self) -> np.ndarray:
        """Read the whole tensor."""
        return self.read(tuple(slice(0, size) for size in self.shape))


Tensors = dict[str, LazyTensor]


def in_memory(values: np.ndarray) -> LazyTensor:
    """Return a tensor whose numbers are there."""
    return LazyTensor(values.shape, values.dtype, lambda index: values[index])
