"""Weights that are no numbers are found as they are read: NaN and infinity by their bits."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxtune.core.errors import UserError
from jaxtune.weights.tensors import LazyTensor

_BLOCK = 1 << 18
_PENDING = 4  # tensors whose numbers wait to be looked at, so that few are held in memory


def all_finite(values: np.ndarray) -> bool:
    """Return whether a contiguous array holds neither NaN nor infinity.

    As integers, those of one sign are the largest; no copy is made, and NumPy's maximum is as fast
    as memory.
    """
    if np.issubdtype(values.dtype, np.integer):
        return True
    width = values.dtype.itemsize
    infinity = int(np.array(np.inf, values.dtype).view(f"u{width}"))
    negative = infinity | 1 << 8 * width - 1
    signed, unsigned = (values.reshape(-1).view(f"{kind}{width}") for kind in "iu")
    return all(
        signed[start : start + _BLOCK].max() < infinity
        and unsigned[start : start + _BLOCK].max() < negative
        for start in range(0, len(signed), _BLOCK)
    )


class FiniteChecks:
    """Looks at the numbers of tensors while the next ones are read; leaving its block waits.

    Args:
        where: the model's path, for messages about tensors that do not know their file.

    Raises:
        UserError: one is not finite; at the latest when the block is left.

    """

    def __init__(self, where: Path) -> None:
        self._where = where
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[tuple[str, LazyTensor, np.ndarray, Future[bool]]] = deque()

    def __enter__(self) -> "FiniteChecks":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            while self._pending and error is None:
                self._take()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def later(self, name: str, tensor: LazyTensor, values: np.ndarray) -> None:
        """Look at a part of a tensor, which is contiguous and in the dtype that it is kept in."""
        self._pending.append((name, tensor, values, self._pool.submit(all_finite, values)))
        if len(self._pending) > _PENDING:
            self._take()

    def now(self, name: str, tensor: LazyTensor, values: np.ndarray) -> None:
        """Look at it at once."""
        if not all_finite(np.ascontiguousarray(values)):
            raise self._error(name, tensor, values.dtype)

    def _take(self) -> None:
        name, tensor, values, finite = self._pending.popleft()
        if not finite.result():
            raise self._error(name, tensor, values.dtype)

    def _error(self, name: str, tensor: LazyTensor, kept: np.dtype) -> UserError:
        where = tensor.file or self._where
        if kept != tensor.dtype and all_finite(np.ascontiguousarray(tensor.all())):
            return UserError(
                f"{where}: tensor {name} holds numbers that {kept.name} cannot hold. Set "
                "model.dtype to auto."
            )
        return UserError(
            f"{where}: tensor {name} holds NaN or infinity, with which nothing can be computed. "
            "Download or save the model again."
        )
