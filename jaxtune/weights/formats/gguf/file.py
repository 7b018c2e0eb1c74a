"""A GGUF file: its header, and its tensors under Hugging Face's names.

The header is parsed here because the `gguf` package takes seconds for a vocabulary; that package
de-quantizes the block formats.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError, listed
from jaxtune.weights.tensors import Index, LazyTensor

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUF:
    """A parsed file: metadata by key, tensors by llama.cpp's names, unread."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, LazyTensor]


class _Cursor:
    """A position in a file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += size
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        if self.at + size > len(self.data):
            raise struct.error("a string runs past the end of the file")
        value = self.data[self.at : self.at + size]
        self.at += size
        return value.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        if inner == _ARRAY:
            return [self.value(inner) for _ in range(count)]
        values = np.frombuffer(self.data, dtype="<" + _SCALARS[inner], count=count, offset=self.at)
        self.at += values.nbytes
        return values.tolist()


def open_gguf(path: Path) -> GGUF:
    """Parse the header of a GGUF file (version 2 or 3, little endian); tensors stay on disk.

    Raises:
        UserError: the file is not GGUF, is truncated, or holds a block format that the `gguf`
            package does not know.

    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    try:
        return _parse(path, _Cursor(data))
    except (struct.error, KeyError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}). Download it again.") from None


def _parse(path: Path, cursor: _Cursor) -> GGUF:
    magic, version = cursor.scalar("I"), cursor.scalar("I")
    if magic != 0x46554747 or version not in (2, 3):
        raise ValueError(f"magic {magic:#x}, version {version}")
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the key {key} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = []
    for _ in range(tensor_count):
        name, dims = cursor.text(), cursor.scalar("I")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
        infos.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    names = [name for name, *_ in infos]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tensors {listed(twice)} occur twice")
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: _lazy(path, cursor.data, name, shape, kind, start + offset)
        for name, shape, kind, offset in infos
    }
    return GGUF(path, metadata, tensors)


def _lazy(
    path: Path, data: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> LazyTensor:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: reading GGUF needs the package gguf: pip install 'jaxtune[gguf]'."
        ) from None
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except ValueError:
        raise UserError(f"{path}: tensor {name} has the unknown block format {kind}.") from None
    if not shape or shape[-1] % block:
        raise ValueError(
            f"tensor {name} has the shape {list(shape)}, which is not a whole number of blocks "
            f"of {block}"
        )
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    row_bytes = shape[-1] // block * size
    if offset + rows * row_bytes > len(data):
        raise ValueError(f"tensor {name} runs past the end of the file")
    plain = {0: np.dtype("float32"), 1: np.dtype("float16")}.get(kind)

    def read(index: Index) -> np.ndarray:
        raw = np.frombuffer(data, np.uint8, rows * row_bytes, offset)
        raw = raw.reshape(*shape[:-1], row_bytes)
        # Blocks lie along the last axis, so rows can be selected before they are de-quantized.
        if index and len(shape) > 1:
            raw = raw[index[0]]
        if plain is None:
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))
        else:
            values = raw.view(plain)
        return values[(slice(None), *index[1:])] if len(shape) > 1 else values[index]

    return LazyTensor(shape, plain or np.dtype("float32"), read, quantized=plain is None)
