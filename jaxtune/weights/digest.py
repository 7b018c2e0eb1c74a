"""Digests by which a run notices that weights were replaced, without reading all of them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = (".safetensors", ".bin", ".pth", ".gguf")
_DESCRIPTIONS = ("config.json", "params.json", "adapter_config.json")
_HEADER, _SAMPLE, _SAMPLES = 1 << 16, 1 << 12, 16


def digest_weights(path: Path) -> str:
    """Return a digest of the weights in a file or directory: of the names and sizes of the files,
    of their first 64 KB and of 16 samples of 4 KB each, spread evenly.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_HEADER))
            for number in range(1, _SAMPLES + 1):
                opened.seek(max(0, size * number // _SAMPLES - _SAMPLE))
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()[:32]


def _files(path: Path) -> Iterator[Path]:
    """Yield the files that hold weights or describe them; in folders below, as orbax's, all."""
    if path.is_file():
        yield path
    for file in sorted(path.rglob("*")):
        is_ours = file.suffix in _SUFFIXES or file.name in _DESCRIPTIONS
        if file.is_file() and (is_ours or file.parent != path):
            yield file
