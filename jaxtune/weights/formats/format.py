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
from jaxtune.models.families.config_types import check_config
from jaxtune.weights.dialects import in_both_dialects
from jaxtune.weights.generation_config import write_generation_config
from jaxtune.weights.source import Source
from jaxtune.weights.tensors import Tensors
from jaxtune.weights.tokenizer_files import is_same, load_tokenizer, save_tokenizer
from jaxtune.weights.verify import Texts, compare_with_transformers

USE_BY_JAXTUNE = """import jaxtune

model, tokenizer = jaxtune.load("path/of/this/directory")"""


@dataclass(frozen=True)
class ModelContents:
    """A model as a format is asked to write it.

    Attributes:
        source: where it comes from; its generation settings go with it.
        config_json: its `config.json`.
        tensors: all weights by Hugging Face's names, not yet rounded.
        dtype: what the weights are rounded to; None keeps each tensor's own.
        tokenizer: None where the model comes without.
        tokenizer_files: where it was read from; empty where no such files are Hugging Face's.
        stop_ids: tokens that end an answer.

    """

    source: Source
    config_json: dict[str, Any]
    tensors: Tensors
    dtype: str | None
    tokenizer: Tokenizer | None
    tokenizer_files: Sequence[Path] = ()
    stop_ids: Sequence[int] = ()

    @property
    def has_own_tokenizer(self) -> bool:
        """Return whether the tokenizer and the stop tokens are what the source itself has."""
        own = self.source.tokenizer()
        is_own = self.tokenizer is None or (own is not None and is_same(own, self.tokenizer))
        return is_own and set(self.stop_ids) <= set(self.source.stop_ids())

    def write_companions(self, directory: Path) -> None:
        """Write what belongs beside the weights: tokenizer files and `generation_config.json`."""
        write_generation_config(directory, self.source.generation_config(), self.stop_ids)
        save_tokenizer(directory, self.tokenizer_files, self.tokenizer)


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
        write_json(
            path / "config.json", in_both_dialects(contents.config_json, main_dtype(tensors))
        )
        contents.write_companions(path)


@dataclass(frozen=True)
class ModelDirectory(Source):
    """What `DirectoryFormat` writes; a format adds `tensors`."""

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path / "config.json"

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        raw = read_json(self.config_path)
        check_config(raw, str(self.config_path))
        return raw

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return load_tokenizer(self.path)


def main_dtype(tensors: Tensors) -> str:
    """Return the dtype that most of the tensors' numbers have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name])
