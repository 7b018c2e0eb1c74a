"""GGUF as a format of `weights.formats`: a single file with its tokenizer and chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.tokenizer import Tokenizer
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.formats.format import ModelContents, ModelFormat
from jaxtune.weights.formats.gguf import file as gguf_file
from jaxtune.weights.formats.gguf import models, quantize, rope, writer
from jaxtune.weights.formats.gguf import tokenizer as gguf_tokenizer
from jaxtune.weights.formats.gguf.llama_cpp import compare_with_llama_cpp
from jaxtune.weights.source import Source, sorted_ids
from jaxtune.weights.tensors import LazyTensor, Tensors
from jaxtune.weights.verify import Texts


@dataclass(frozen=True)
class GGUFSource(Source):
    """A GGUF file, with its tokenizer and chat template."""

    file: gguf_file.GGUF

    @property
    def short_name(self) -> str:
        """See Source."""
        name = super().short_name
        return gguf_file.shard_prefix(Path(name)) or name.removesuffix(".gguf")

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return models.config_json(self.file)

    def tensors(self) -> Tensors:
        """See Source."""
        return models.named_tensors(self.file)

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        if "tokenizer.ggml.tokens" not in self.file.metadata:
            return None
        return gguf_tokenizer.read_tokenizer(self.file)

    def stop_ids(self) -> list[int]:
        """Return the ends of a sequence, of a turn and of a message."""
        keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
        ids = [self.file.metadata.get(key) for key in keys]
        return sorted_ids([token for token in ids if type(token) is int])

    def pretrained_arguments(self) -> dict[str, str] | None:
        """See Source."""
        if gguf_file.shard_prefix(self.path):
            return None  # transformers reads one file
        return {
            "pretrained_model_name_or_path": str(self.path.resolve().parent),
            "gguf_file": self.path.name,
        }


class GGUFFormat(ModelFormat):
    """A GGUF file, version 3."""

    name = "gguf"
    description = "A model in GGUF, for llama.cpp and what is built on it."
    needs = "a .gguf file"
    dtypes = tuple(quantize.MATRIX_TYPES)
    suffix = ".gguf"
    checked_by = "llama.cpp"

    def recognizes(self, path: Path) -> bool:
        """See ModelFormat."""
        return path.is_file() and path.suffix.lower() == self.suffix

    def open(self, path: Path, name: str) -> Source:
        """See ModelFormat."""
        return GGUFSource(name, path, gguf_file.open_gguf(path))

    def write(self, path: Path, contents: ModelContents) -> None:
        """See ModelFormat."""
        writer.write_gguf(
            path,
            contents.tensors,
            contents.config_json,
            _tokenizer_metadata(contents),
            contents.source.short_name,
            _matrix_dtype(contents),
        )

    def round_trip(self, contents: ModelContents) -> Tensors:
        """Return the tensors as stored, with what llama.cpp changes applied and undone.

        Raises:
            UserError: the format has no place for something in the model.

        """
        config = from_hf(contents.config_json, contents.source.name)
        writer.check_expressible(config)
        dtype = _matrix_dtype(contents)
        quantize.check_encoder(dtype)

        def stored(tensor: LazyTensor, name: str) -> LazyTensor:
            return writer.as_stored(tensor, name, dtype, config)

        return models.round_trip(contents.tensors, config, stored)

    def config_read_back(self, contents: ModelContents) -> dict[str, Any]:
        """See ModelFormat."""
        return rope.as_read_back(contents.config_json, contents.source.name)

    def compare_outside(
        self, contents: ModelContents, written: Source, logits: np.ndarray, texts: Texts
    ) -> tuple[str | None, float | None]:
        """See ModelFormat."""
        assert isinstance(written, GGUFSource)
        if "tokenizer.ggml.tokens" not in written.file.metadata:
            return "its server wants a tokenizer, and the model has none", None
        return compare_with_llama_cpp(
            written.path,
            logits,
            texts,
            _matrix_dtype(contents),
            # That of a GGUF file goes on as it is, whatever is read of it here.
            with_tokenizer=not isinstance(contents.source, GGUFSource),
        )

    def file_name(self, contents: ModelContents) -> str:
        """See ModelFormat."""
        return f"{contents.source.short_name}-{_matrix_dtype(contents)}{self.suffix}"

    def usage(self, source: Source) -> str:
        """See Format."""
        return super().usage(source).replace("this/directory", "the/file.gguf")


FORMAT = GGUFFormat()


def _matrix_dtype(contents: ModelContents) -> str:
    return contents.dtype or contents.tensors["model.embed_tokens.weight"].dtype.name


def _tokenizer_metadata(contents: ModelContents) -> dict[str, Any]:
    source, tokenizer = contents.source, contents.tokenizer
    if isinstance(source, GGUFSource) and contents.has_own_tokenizer:
        items = source.file.metadata.items()
        metadata = {key: value for key, value in items if key.startswith("tokenizer.")}
        return gguf_tokenizer.with_stops(metadata, list(contents.stop_ids))
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}  # llama.cpp's word for it
    vocab_size = contents.config_json["vocab_size"]
    return gguf_tokenizer.tokenizer_metadata(tokenizer, vocab_size, list(contents.stop_ids))
