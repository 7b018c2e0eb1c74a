"""Weights in PyTorch's own files (`.bin`, `.pth`): read memory-mapped and without running pickled
code, written from a scratch file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import UserError, first_line, listed
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_DTYPES = {
    "torch.float64": np.dtype("float64"),
    "torch.float32": np.dtype("float32"),
    "torch.float16": np.dtype("float16"),
    "torch.bfloat16": jnp.dtype(jnp.bfloat16),
}


def open_file(path: Path) -> Tensors:
    """Return the tensors of one PyTorch file, unread.

    Raises:
        UserError: PyTorch is not installed, the file is truncated, or it holds anything other than
            tensors by name.

    """
    from pickle import UnpicklingError

    torch = _torch(path)
    try:
        state = _load(torch, path)
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, which could run code and is not loaded "
            f"({first_line(error)})."
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is not a whole file of PyTorch ({first_line(error)}). Download it again."
        ) from None
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path} does not hold tensors by name. Save the model's state_dict.")
    return {name: _lazy(tensor, name, path) for name, tensor in state.items()}


def _load(torch: Any, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format before PyTorch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def _lazy(tensor: Any, name: str, path: Path) -> LazyTensor:
    shape, dtype = tuple(tensor.shape), _DTYPES.get(str(tensor.dtype))
    if dtype is not None:
        return LazyTensor(shape, dtype, _reader(tensor, dtype), file=path)
    if tensor.is_floating_point():
        raise UserError(
            f"{path}: tensor {name} has dtype {tensor.dtype}; supported are {listed(_DTYPES)}."
        )
    # A buffer. Whether it may be there is for the table of names to say.
    return LazyTensor(
        shape, np.dtype("int64"), lambda index: tensor[index].numpy().astype(np.int64)
    )


def _reader(tensor: Any, dtype: np.dtype) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        import torch

        part = tensor[index].contiguous()
        if dtype == jnp.bfloat16:  # NumPy has no bfloat16, so the bits are passed on
            return part.view(torch.int16).numpy().view(dtype)
        return part.numpy()

    return read


def write_file(path: Path, tensors: Tensors, scratch: Path) -> None:
    """Write tensors as one file of PyTorch.

    Args:
        path: the file.
        tensors: by the names they will have.
        scratch: a file mapped to memory to gather them in, as large as all of them.

    """
    torch = _torch(path)
    sizes = [tensor.nbytes for tensor in tensors.values()]
    starts = np.concatenate([[0], np.cumsum([-(-size // 64) * 64 for size in sizes])])
    whole = np.memmap(scratch, np.uint8, "w+", shape=(int(starts[-1]),))
    state = {}
    for (name, tensor), start, size in zip(tensors.items(), starts[:-1], sizes, strict=True):
        at = int(start)
        for block in tensor.blocks():
            whole[at : at + block.nbytes] = block.reshape(-1).view(np.uint8)
            at += block.nbytes
        dtype = getattr(torch, tensor.dtype.name)
        # Each tensor needs a storage of its own, else torch.save writes all of them for each.
        values = torch.from_numpy(whole[int(start) : int(start) + size])
        state[name] = values.view(dtype).reshape(tensor.shape)
    torch.save(state, path)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: PyTorch's files need PyTorch: pip install 'jaxtune[torch]'."
        ) from None
    return torch
