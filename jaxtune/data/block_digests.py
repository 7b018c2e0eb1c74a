"""Digests of a file's blocks: a large file is checked in a sample, and wherever it is damaged."""

import hashlib
import random
from pathlib import Path
from typing import Any

_BLOCK_BYTES, _SAMPLED_BLOCKS = 4 << 20, 16


class BlockDigests:
    """The digests of a file's blocks, as it is written."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._block, self._size = _block_hash(), 0

    def update(self, data: bytes) -> None:
        """Add bytes."""
        view = memoryview(data)
        while view:
            part = view[: _BLOCK_BYTES - self._size]
            self._block.update(part)
            self._size, view = self._size + len(part), view[len(part) :]
            if self._size == _BLOCK_BYTES:
                self._end_block()

    def close(self) -> list[str]:
        """Return the digests of all blocks."""
        if self._size:
            self._end_block()
        return self._digests

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block, self._size = _block_hash(), 0


def _block_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def is_intact(path: Path, digests: list[str], *, whole: bool) -> bool:
    """Return whether a file is what was written.

    Args:
        path: the file.
        digests: of its blocks.
        whole: look at all blocks, not only at some, the first and the last among them.

    """
    numbers = range(len(digests))
    if len(numbers) > _SAMPLED_BLOCKS and not whole:
        inner = random.sample(numbers[1:-1], _SAMPLED_BLOCKS - 2)
        numbers = [0, *sorted(inner), len(digests) - 1]
    with path.open("rb") as file:
        for number in numbers:
            file.seek(number * _BLOCK_BYTES)
            block = _block_hash()
            block.update(file.read(_BLOCK_BYTES))
            if block.hexdigest() != digests[number]:
                return False
    return True
