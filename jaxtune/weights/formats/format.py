"""What a format of weights is.

A format that holds a whole model implements `ModelFormat`: it recognizes, opens and writes a path,
and says what it rounds. `weights.convert` verifies what it wrote. Most keep the weights in a
directory beside Hugging Face's `config.json` and tokenizer files: `DirectoryFormat` and
`ModelDirectory` leave only the weights to them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.dtypes import DTYPES
from jaxtune.core.files import read_json, write_json
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.weights.source import Source, sorted_ids
from jaxtune.weights.tensors import Tensors
from jaxtune.weights.tokenizer_files import load_tokenizer, save_tokenizer
from jaxtune.weights.verify import Texts, compare_with_transformers

USE_BY_JAXTUNE = """import jaxtune

model, tokenizer = jaxtune.load("path/of/this/directory")"""


@dataclass(frozen=True)
class ModelContents:
    """A model as a format is asked to write it.

    Attributes:
        source: where it comes from; its tokenizer files and generation settings go with it.
        config_json: its `config.json`.
        tensors: all weights by Hugging Face's names, not yet rounded.
        dtype: what the weights are rounded to; None keeps each tensor's own.
        tokenizer: None where the model comes without.

    """

    source: Source
    config_json: dict[str, Any]
    tensors: Tensors
    dtype: str | None
    tokenizer: Tokenizer | None


class Format(ABC):
    """A format that a model or an adapter is exported in.

    Attributes:
        name: what `--to` calls it; also the name of its module.
        description: one sentence for the model card.
        library: the `library_name` of the model card.
        checked_by: the program whose logits an export is compared with.
        keeps_adapter: whether an adapter is written beside its base instead of merged into it.

    """

    name: str
    description: str
    library: str = "transformers"
    checked_by: str = "transformers"
    keeps_adapter: bool = False

    @abstractmethod
    def usage(self, source: Source) -> str:
        """Return Python code that loads the export, for the model card.

        Args:
            source: the base.

        """


class ModelFormat(Format):
    """A format that holds a whole model.

    Attributes:
        needs: what a path in this format is, for messages.
        dtypes: names of the dtypes that weights can be stored in.
        suffix: of the file, where the format is a single file; None where it is a directory.
        is_fallback: whether any other format that recognizes a path takes precedence.
        read_by_transformers: whether an export's logits are compared with those of transformers.

    """

    needs: str
    dtypes: Sequence[str] = tuple(DTYPES)
    suffix: str | None = None
    is_fallback: bool = False
    read_by_transformers: bool = False

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Return whether a path is in this format."""

    @abstractmethod
    def open(self, path: Path, name: str) -> Source:
        """Open a path that this format recognizes, its weights unread.

        Raises:
            UserError: the path is damaged, or holds what jaxtune does not implement.

        """

    @abstractmethod
    def write(self, path: Path, contents: ModelContents) -> None:
        """Write the model into an existing empty directory, or as the file `path`.

        Raises:
            UserError: the format has no place for something in the model.

        """

    def round_trip(self, contents: ModelContents) -> Tensors:
        """Return the tensors that reading the written model back must give.

        Raises:
            UserError: the format has no place for something in the model.

        """
        if contents.dtype is None:
            return contents.tensors
        dtype = DTYPES[contents.dtype]
        return {name: tensor.astype(dtype) for name, tensor in contents.tensors.items()}

    def config_read_back(self, contents: ModelContents) -> dict[str, Any]:
        """Return a `config.json` of the architecture that reading the written model must give."""
        return contents.config_json

    def compare_outside(
        self, contents: ModelContents, written: Source, logits: np.ndarray, texts: Texts
    ) -> tuple[str | None, float | None]:
        """Compare our logits on a model that was written with those of `checked_by`.

        Returns:
            Why they were not compared, and the largest difference; one of them is None.

        Raises:
            UserError: that program cannot read what was written.
            RunError: the logits differ by more than rounding.

        """
        if self.read_by_transformers:
            return compare_with_transformers(written, logits, texts)
        return f"not for {self.name}", None

    def file_name(self, contents: ModelContents) -> str:
        """Return the name of a format's single file in a directory that the user named."""
        return f"{contents.source.short_name}{self.suffix}"

    def usage(self, source: Source) -> str:
        """See Format."""
        return USE_BY_JAXTUNE


class DirectoryFormat(ModelFormat):
    """A directory of `config.json`, `generation_config.json`, tokenizer files and the weights."""

    @abstractmethod
    def write_weights(self, directory: Path, tensors: Tensors) -> None:
        """Write the weights, in the dtypes that the tensors have."""

    def write(self, path: Path, contents: ModelContents) -> None:
        """See ModelFormat."""
        tensors = self.round_trip(contents)
        self.write_weights(path, tensors)
        write_json(path / "config.json", with_dtype(contents.config_json, tensors))
        if generation := contents.source.generation_config():
            write_json(path / "generation_config.json", generation)
        save_tokenizer(path, contents.source.tokenizer_files(), contents.tokenizer)


@dataclass(frozen=True)
class ModelDirectory(Source):
    """What `DirectoryFormat` writes; a format adds `tensors`."""

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path / "config.json"

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return read_json(self.config_path)

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return load_tokenizer(self.path)

    def stop_ids(self) -> list[int]:
        """Return all that generation_config.json names, else config.json's."""
        path = self.path / "generation_config.json"
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        return sorted_ids(ids) or super().stop_ids()


def with_dtype(config_json: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Return `config.json` with the dtype that most of the tensors' numbers have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + math.prod(tensor.shape)
    key = "torch_dtype" if "torch_dtype" in config_json else "dtype"
    return config_json | {key: max(sizes, key=lambda name: sizes[name])}
