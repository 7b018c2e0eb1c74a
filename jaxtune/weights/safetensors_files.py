"""The tensors of a safetensors file, read and written one by one."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtune.core.errors import UserError, listed
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_DTYPES = {"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype(jnp.bfloat16)}


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file, none of them read yet.

    Raises:
        UserError: the file is cut short or not safetensors, or holds a dtype other than a float of 16 bits or more.

    """
    try:
        file = safe_open(path, framework="np")
        return {name: _lazy(file, name, path) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Download or save it again.") from None


def _lazy(file: Any, name: str, path: Path) -> LazyTensor:
    part = file.get_slice(name)
    if part.get_dtype() not in _DTYPES:
        raise UserError(f"{path}: tensor {name} has dtype {part.get_dtype()}; supported are {listed(_DTYPES)}.")
    return LazyTensor(tuple(part.get_shape()), _DTYPES[part.get_dtype()], _reader(file, name))


def _reader(file: Any, name: str) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        return file.get_slice(name)[index] if index else file.get_tensor(name)

    return read


def write_file(path: Path, tensors: Tensors) -> None:
    """Write tensors as they are read, so that no more than a part of one is in memory; the package's own writer wants all of them."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + nbytes(tensor)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(block.view(np.uint8).data)


def nbytes(tensor: LazyTensor) -> int:
    """Size of a tensor's values."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
