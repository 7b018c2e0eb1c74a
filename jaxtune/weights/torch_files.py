"""Weights in PyTorch's own files (`.bin`, `.pth`): memory-mapped, and never a pickle that runs
code; written from a scratch file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_DTYPES = {
    "torch.float64": np.dtype("float64"),
    "torch.float32": np.dtype("float32"),
    "torch.float16": np.dtype("float16"),
    "torch.bfloat16": jnp.dtype(jnp.bfloat16),
}


def open_file(path: Path) -> Tensors:
    """The tensors of one file of PyTorch, none of them read yet.

    Raises:
        UserError: PyTorch is not installed, the file is cut short, or it holds anything other than
            tensors by name.

    """
    from pickle import UnpicklingError

    torch = _torch(path)
    try:
        found = _load(torch, path)
    except UnpicklingError as error:
        reason = _first_line(error)
        raise UserError(
            f"{path} holds more than tensors, which could run code and is not loaded ({reason})."
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = _first_line(error)
        raise UserError(
            f"{path} is not a whole file of PyTorch ({reason}). Download it again."
        ) from None
    if not isinstance(found, dict) or not all(torch.is_tensor(value) for value in found.values()):
        raise UserError(f"{path} does not hold tensors by name. Save the model's state_dict.")
    return {name: _lazy(tensor, name, path) for name, tensor in found.items()}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _load(torch: Any, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(
            path, map_location="cpu", weights_only=True
        )  # the format before PyTorch 1.6 cannot be mapped


def _lazy(tensor: Any, name: str, path: Path) -> LazyTensor:
    if str(tensor.dtype) not in _DTYPES:
        if (
            not tensor.is_floating_point()
        ):  # a buffer; whether it may be there is for the table of names to say
            return LazyTensor(
                tuple(tensor.shape),
                np.dtype("int64"),
                lambda index: tensor[index].numpy().astype(np.int64),
            )
        raise UserError(
            f"{path}: tensor {name} has dtype {tensor.dtype}; supported are {listed(_DTYPES)}."
        )
    return LazyTensor(
        tuple(tensor.shape), _DTYPES[str(tensor.dtype)], _reader(tensor, _DTYPES[str(tensor.dtype)])
    )


def _reader(tensor: Any, dtype: np.dtype) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        import torch

        part = tensor[index].contiguous()
        if dtype == jnp.bfloat16:  # NumPy has no bfloat16 of its own, so the bits are passed on
            return part.view(torch.int16).numpy().view(dtype)
        return part.numpy()

    return read


def write_file(path: Path, tensors: Tensors, scratch: Path) -> None:
    """Write tensors as one file of PyTorch.

    Args:
        path: the file.
        tensors: by the names they will have.
        scratch: a file to gather them in, mapped to memory; as large as all of them.

    """
    torch = _torch(path)
    sizes = [
        int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        for tensor in tensors.values()
    ]
    starts = np.concatenate([[0], np.cumsum([-(-size // 64) * 64 for size in sizes])])
    whole = np.memmap(scratch, np.uint8, "w+", shape=(int(starts[-1]),))
    found = {}
    for (name, tensor), start, size in zip(tensors.items(), starts[:-1], sizes, strict=True):
        at = int(start)
        for block in tensor.blocks():
            whole[at : at + block.nbytes] = block.reshape(-1).view(np.uint8)
            at += block.nbytes
        dtype = getattr(torch, tensor.dtype.name)
        # A storage of its own for each tensor, else every one of them would be saved with all.
        found[name] = (
            torch.from_numpy(whole[int(start) : int(start) + size])
            .view(dtype)
            .reshape(tensor.shape)
        )
    torch.save(found, path)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: PyTorch's files need PyTorch: pip install 'jaxtune[torch]'."
        ) from None
    return torch
