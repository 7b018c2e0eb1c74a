"""The tensors of a safetensors file, read and written one by one."""

import json
import mmap
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtune.core.errors import UserError, listed
from jaxtune.weights.tensors import Index, LazyTensor, Tensors

_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype(jnp.bfloat16),
}


def open_file(path: Path) -> Tensors:
    """Return the tensors of one safetensors file, unread.

    Raises:
        UserError: the file is truncated or not safetensors, or has a dtype other than a float of 16
            bits or more.

    """
    try:
        # safe_open checks the header, and that the file is as long as the header says.
        file = safe_open(path, framework="np")
        names = file.keys()  # such a file is no mapping, so it cannot be iterated over itself
        with path.open("rb") as raw:
            size = struct.unpack("<Q", raw.read(8))[0]
            header = json.loads(raw.read(size), object_pairs_hook=_without_duplicates)
            kinds = {name: header[name]["dtype"] for name in names}
            data = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}). Download or save it again."
        ) from None
    for name, kind in kinds.items():
        if kind not in _DTYPES:
            raise UserError(
                f"{path}: tensor {name} has dtype {kind}; supported are {listed(_DTYPES)}."
            )
    return {name: replace(_lazy(data, 8 + size, header[name]), file=path) for name in kinds}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"its header has {listed(twice)} twice")
    return unique


def _lazy(data: mmap.mmap, start: int, entry: dict[str, Any]) -> LazyTensor:
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]

    def read(index: Index) -> np.ndarray:  # a view of the file; to keep it, copy it
        count = int(np.prod(shape, dtype=np.int64))
        values = np.frombuffer(data, dtype, count, start + entry["data_offsets"][0])
        return values.reshape(shape)[index]

    return LazyTensor(shape, dtype, read)


def write_file(path: Path, tensors: Tensors) -> None:
    """Write tensors as they are read, with only a part of one in memory; the safetensors package's
    own writer needs all of them.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(block.view(np.uint8).data)
