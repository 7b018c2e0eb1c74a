"""Where a model comes from: a hub id, a Hugging Face directory, Meta's files or a GGUF file,
seen alike.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json
from jaxtune.weights import hub
from jaxtune.weights.formats import hf_directory, meta, orbax
from jaxtune.weights.formats.gguf import models as gguf_models
from jaxtune.weights.formats.gguf import tokenizer as gguf_tokenizer
from jaxtune.weights.formats.gguf.file import GGUF, open_gguf
from jaxtune.weights.tensors import Tensors

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Source(ABC):
    """A resolved model.

    Attributes:
        name: what a user would write elsewhere to mean this model: the hub id or the absolute path.
        path: the directory or file on disk.

    """

    name: str
    path: Path

    @property
    @abstractmethod
    def config_path(self) -> Path:
        """The file that describes the architecture, for messages."""

    @abstractmethod
    def config_json(self) -> dict[str, Any]:
        """The parsed `config.json`, or what it would say."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """All weights by Hugging Face's names, unread."""

    @abstractmethod
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where the model comes without."""

    def tokenizer_files(self) -> list[Path]:
        """The files that the tokenizer is read from, where they are Hugging Face's."""
        return [
            self.path / name
            for name in TOKENIZER_FILES
            if self.path.is_dir() and (self.path / name).exists()
        ]

    def stop_ids(self) -> list[int]:
        """Ids at which generation ends."""
        return _ids(self.config_json().get("eos_token_id"))

    def transformers(self) -> dict[str, str] | None:
        """What `from_pretrained` of transformers loads the same weights by; None where it
        cannot.
        """
        return None

    def generation_config(self) -> dict[str, Any]:
        """What ends and begins a text, for exports in Hugging Face's format."""
        path = self.path / "generation_config.json"
        if path.exists():
            return read_json(path)
        stops, config = self.stop_ids(), self.config_json()
        found = {
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        }
        return {
            key: value
            for key, value in (found | {"pad_token_id": config.get("pad_token_id")}).items()
            if value is not None
        }


@dataclass(frozen=True)
class Directory(Source):
    """A directory in Hugging Face's format, or with the weights as an orbax checkpoint."""

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path / "config.json"

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return read_json(self.config_path)

    def tensors(self) -> Tensors:
        """See Source."""
        return (
            orbax.open_directory(self.path)
            if (self.path / orbax.FOLDER).is_dir()
            else hf_directory.open_directory(self.path)
        )

    def tokenizer(self) -> Any | None:
        """See Source."""
        return load_tokenizer(self.path)

    def stop_ids(self) -> list[int]:
        """All that generation_config.json names, else config.json's."""
        path = self.path / "generation_config.json"
        found = read_json(path).get("eos_token_id") if path.exists() else None
        return _ids(found) or super().stop_ids()

    def transformers(self) -> dict[str, str] | None:
        """See Source."""
        return (
            None
            if (self.path / orbax.FOLDER).is_dir()
            else {"pretrained_model_name_or_path": str(self.path)}
        )


@dataclass(frozen=True)
class GGUFFile(Source):
    """A GGUF file, with its tokenizer and chat template."""

    file: GGUF

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return gguf_models.config_json(self.file)

    def tensors(self) -> Tensors:
        """See Source."""
        return gguf_models.tensors(self.file)

    def tokenizer(self) -> Any | None:
        """See Source."""
        return (
            gguf_tokenizer.tokenizer(self.file)
            if "tokenizer.ggml.tokens" in self.file.metadata
            else None
        )

    def stop_ids(self) -> list[int]:
        """The ends of a sequence, of a turn and of a message."""
        return _ids(
            [
                self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
                for name in ("eos", "eot", "eom")
            ]
        )

    def transformers(self) -> dict[str, str] | None:
        """See Source."""
        return {
            "pretrained_model_name_or_path": str(self.path.resolve().parent),
            "gguf_file": self.path.name,
        }


@dataclass(frozen=True)
class MetaDirectory(Source):
    """Meta's own files of Llama."""

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path / meta.PARAMS

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return meta.config_json(self.path)

    def tensors(self) -> Tensors:
        """See Source."""
        return meta.tensors(self.path)

    def tokenizer(self) -> Any | None:
        """A tokenizer in Hugging Face's format beside the weights; Meta's own `tokenizer.model`
        alone is not read.
        """
        return load_tokenizer(self.path) if (self.path / "tokenizer.json").exists() else None


@dataclass(frozen=True)
class OverriddenSource(Source):
    """Another source's model with other weights.

    Attributes:
        base: where the rest comes from.
        raw: its `config.json`.
        weights: its tensors.

    """

    base: Source
    raw: dict[str, Any]
    weights: Tensors

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.base.config_path

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return self.raw

    def tensors(self) -> Tensors:
        """See Source."""
        return self.weights

    def tokenizer(self) -> Any | None:
        """See Source."""
        return self.base.tokenizer()

    def tokenizer_files(self) -> list[Path]:
        """See Source."""
        return self.base.tokenizer_files()

    def stop_ids(self) -> list[int]:
        """See Source."""
        return self.base.stop_ids()

    def generation_config(self) -> dict[str, Any]:
        """See Source."""
        return self.base.generation_config()


def resolve(model: str) -> Source:
    """The model that a user's string means.

    Args:
        model: a directory with `config.json` or with Meta's `params.json`, a `.gguf` file, or a hub
            id such as org/name, with a branch, tag or commit as org/name@revision.

    Raises:
        UserError: there is no such thing, or the hub does not give it out.

    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "config.json").exists():
            return Directory(str(path.resolve()), path)
        if (path / meta.PARAMS).exists():
            return MetaDirectory(str(path.resolve()), path)
        raise UserError(
            f"{model} holds no config.json and no {meta.PARAMS}, so it is a model directory "
            "neither of Hugging Face nor of Meta."
        )
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"{model} is a file, but not a .gguf one. Give the model's directory or a .gguf "
                "file."
            )
        return GGUFFile(str(path.resolve()), path, open_gguf(path))
    if (named := _HUB_ID.fullmatch(model)) and not model.startswith((".", "/")):
        path = hub.download(*named.groups())
        return (
            Directory(model, path)
            if (path / "config.json").exists()
            else MetaDirectory(model, path)
        )
    raise UserError(
        f"{model} does not exist. Give a directory with config.json, a .gguf file or a hub id "
        "(org/name)."
    )


def is_hub_id(model: str) -> bool:
    """Whether a string that names nothing on disk has the form of a hub id."""
    return bool(_HUB_ID.fullmatch(model)) and not model.startswith((".", "/"))


def _ids(found: Any) -> list[int]:
    ids = found if isinstance(found, list) else [found]
    return sorted({token for token in ids if token is not None})


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer saved in a directory, or None where there is none.

    Raises:
        UserError: there is one and it cannot be read.

    """
    if not any((path / name).exists() for name in TOKENIZER_FILES[:4]):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{path}: the tokenizer cannot be loaded: {type(error).__name__}: {error}"
        ) from error
