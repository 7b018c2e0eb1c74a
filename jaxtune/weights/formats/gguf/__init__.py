"""GGUF, the format of llama.cpp."""

from jaxtune.weights.formats.gguf.format import FORMAT

__all__ = ["FORMAT"]
