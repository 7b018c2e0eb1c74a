"""Where a model comes from: a hub id, a directory or a file in any format, behind one interface."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.core.files import check_directory
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.weights import hub
from jaxtune.weights.formats.registry import find_format
from jaxtune.weights.generation_config import read_generation_config, token_ids
from jaxtune.weights.tensors import Tensors
from jaxtune.weights.tokenizer_files import tokenizer_files

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


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
    def short_name(self) -> str:
        """Return the name without its organization or folder, for file names and metadata."""
        return self.name.rpartition("/")[2]

    @property
    def repository(self) -> tuple[str, str | None] | None:
        """Return the id of the hub's repository and the revision that was asked for; None for a
        model on disk.
        """
        if not is_hub_id(self.name):
            return None
        name, _, revision = self.name.partition("@")
        return name, revision or None

    @property
    @abstractmethod
    def config_path(self) -> Path:
        """Return the file that describes the architecture, for messages."""

    @abstractmethod
    def config_json(self) -> dict[str, Any]:
        """Return the parsed `config.json`, or what it would say."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """Return all weights by Hugging Face's names, unread."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, or None where the model comes without."""

    def tokenizer_files(self) -> list[Path]:
        """Return the files that the tokenizer is read from, where they are Hugging Face's."""
        return tokenizer_files(self.path) if self.path.is_dir() else []

    def stop_ids(self) -> list[int]:
        """Return the ids at which generation ends: all that generation_config.json names, else
        those of the configuration.
        """
        named = read_generation_config(self.path)
        return token_ids(named, "eos_token_id", str(self.path)) or token_ids(
            self.config_json(), "eos_token_id", str(self.config_path)
        )

    def pretrained_arguments(self) -> dict[str, str] | None:
        """Return the arguments by which transformers' `from_pretrained` loads the same weights;
        None where it cannot.
        """
        return None

    def generation_config(self) -> dict[str, Any]:
        """Return the `generation_config.json` of an export in Hugging Face's format."""
        if named := read_generation_config(self.path):
            return named
        stops, config = self.stop_ids(), self.config_json()
        ids = {
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
            "pad_token_id": config.get("pad_token_id"),
        }
        return {key: value for key, value in ids.items() if value is not None}


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
    def short_name(self) -> str:
        """See Source."""
        return self.base.short_name

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

    def tokenizer(self) -> Tokenizer | None:
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
    """Return the model that a user's string means.

    Args:
        model: a directory or file in one of the formats of `weights.formats`, or a hub id such as
            org/name, with a branch, tag or commit as org/name@revision.

    Raises:
        UserError: there is no such model, or the hub does not give access to it.

    """
    path = Path(model).expanduser()
    if path.exists():
        check_directory(path)
        return find_format(path).open(path, str(path.resolve()))
    if is_hub_id(model):
        name, _, revision = model.partition("@")
        path = hub.download_model(name, revision or None)
        check_directory(path)
        return find_format(path).open(path, model)
    raise UserError(
        f"{model} does not exist. Give a directory with config.json, a .gguf file or a hub id "
        "(org/name)."
    )


def is_hub_id(model: str) -> bool:
    """Return whether a string that names nothing on disk has the form of a hub id."""
    return bool(_HUB_ID.fullmatch(model)) and not model.startswith((".", "/"))


def sorted_ids(ids: Any) -> list[int]:
    """Return token ids in order; configurations name none (null), one or a list of them."""
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({token for token in ids if token is not None})
