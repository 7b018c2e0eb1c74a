"""A GGUF file, or several that hold one model: the header, and the tensors by llama.cpp's names.

The header is parsed here because the `gguf` package takes seconds for a vocabulary; that package
de-quantizes the block formats. No count of the header is trusted: the file must have room for it.
"""

import math
import mmap
import re
import struct
from collections import Counter
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
# Far above what any model has, and small enough to be held in memory.
_MAX_PAIRS, _MAX_TENSORS, _MAX_ITEMS = 1 << 16, 1 << 20, 1 << 24
_MAX_TEXT, _MAX_DIMS = 1 << 26, 4
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


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

    def count(self, what: str, largest: int, each: int) -> int:
        """Return a count of things of at least `each` bytes."""
        count = self.scalar("Q")
        if count > largest or self.at + count * each > len(self.data):
            raise ValueError(f"{count} {what}, for which it is too small")
        return count

    def text(self) -> str:
        size = self.count("bytes in a string", _MAX_TEXT, 1)
        value = self.data[self.at : self.at + size]
        self.at += size
        return value.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_code(kind))
        inner = self.scalar("I")
        size = 8 if inner == _STRING else struct.calcsize("<" + _code(inner))
        count = self.count("items in an array", _MAX_ITEMS, size)
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        values = np.frombuffer(self.data, dtype="<" + _code(inner), count=count, offset=self.at)
        self.at += values.nbytes
        return values.tolist()


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SCALARS[kind]


def open_gguf(path: Path) -> GGUF:
    """Parse the header of a GGUF file (version 2 or 3, little endian), or of all the files of a
    model that is split over several, of which `path` is one; tensors stay on disk.

    Raises:
        UserError: the file is not GGUF, is truncated, holds a block format that the `gguf`
            package does not know, or is one of several that are not all there.

    """
    first = _open_one(path)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1):
        return first
    match = _SHARD.fullmatch(path.name)
    if type(count) is not int or match is None or int(match[3]) != count or count < 0:
        raise UserError(
            f"{path} is one of {count} files of a model (split.count); they must be named "
            "NAME-00001-of-0000N.gguf, with N the number of files."
        )
    paths = [
        path.with_name(f"{match[1]}-{number:05}-of-{match[3]}{match[4]}")
        for number in range(1, count + 1)
    ]
    if missing := [shard.name for shard in paths if not shard.exists()]:
        raise UserError(
            f"{path} is one of {count} files of a model; {listed(missing)} must lie beside it."
        )
    return _join([first if shard == path else _open_one(shard) for shard in paths])


def shard_prefix(path: Path) -> str | None:
    """Return what the names of a split model's files begin with; None for a single file."""
    match = _SHARD.fullmatch(path.name)
    return match and match[1]


def _join(shards: list[GGUF]) -> GGUF:
    """Return the files of one model as one; the first has the metadata."""
    tensors: dict[str, LazyTensor] = {}
    for number, shard in enumerate(shards):
        declared = shard.metadata.get("split.no"), shard.metadata.get("split.count")
        if declared != (number, len(shards)):
            raise UserError(
                f"{shard.path}: split.no and split.count are {declared[0]} and {declared[1]} "
                f"instead of {number} and {len(shards)}: a file of another model, or renamed."
            )
        if twice := sorted(tensors.keys() & shard.tensors.keys()):
            raise UserError(f"{shard.path}: {listed(twice)} are in an earlier file too.")
        tensors |= shard.tensors
    total = shards[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(
            f"{shards[0].path}: split.tensors.count is {total}, and the files have "
            f"{len(tensors)} tensors. Download them again."
        )
    return GGUF(shards[0].path, shards[0].metadata, tensors)


def _open_one(path: Path) -> GGUF:
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
    tensor_count = cursor.count("tensors", _MAX_TENSORS, 24)
    pair_count = cursor.count("pairs of metadata", _MAX_PAIRS, 13)
    metadata = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the key {key} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = []
    for _ in range(tensor_count):
        name, dims = cursor.text(), cursor.scalar("I")
        if dims > _MAX_DIMS:
            raise ValueError(f"tensor {name[:80]} has {dims} dimensions")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
        infos.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    counts = Counter(name for name, *_ in infos)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"tensors {listed(twice)} occur twice")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {str(alignment)[:40]}")
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
    if not shape or not math.prod(shape) or shape[-1] % block:
        raise ValueError(
            f"tensor {name} has the shape {list(shape)}, which is not a whole number of blocks "
            f"of {block}"
        )
    rows = math.prod(shape[:-1])
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
