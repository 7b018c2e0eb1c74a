"""Where a model comes from: a hub id, a Hugging Face directory or a GGUF file, seen alike."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json
from jaxtune.weights import gguf_llama, gguf_tokenizer, safetensors_files
from jaxtune.weights.gguf_file import GGUF, open_gguf
from jaxtune.weights.tensors import Tensors

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A resolved model.

    Attributes:
        name: what a user would write elsewhere to mean this model: the hub id or the absolute path.
        path: the directory or file on disk.
        gguf: the parsed file, where it is one.

    """

    name: str
    path: Path
    gguf: GGUF | None = None

    @property
    def config_path(self) -> Path:
        """The file that describes the architecture, for messages."""
        return self.path if self.gguf else self.path / "config.json"

    def config_json(self) -> dict[str, Any]:
        """The parsed `config.json`, or what it would say of a GGUF file."""
        if self.gguf:
            return gguf_llama.config_json(self.gguf)
        return read_json(self.config_path)

    def tensors(self) -> Tensors:
        """All weights by Hugging Face's names, unread."""
        return gguf_llama.tensors(self.gguf) if self.gguf else safetensors_files.open_directory(self.path)

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where the model comes without."""
        if self.gguf:
            return gguf_tokenizer.tokenizer(self.gguf) if "tokenizer.ggml.tokens" in self.gguf.metadata else None
        return load_tokenizer(self.path)

    def stop_ids(self) -> list[int]:
        """Ids at which generation ends: all that generation_config.json names, else config.json's."""
        path = self.path / "generation_config.json"
        found = read_json(path).get("eos_token_id") if not self.gguf and path.exists() else None
        if found is None:
            found = self.config_json().get("eos_token_id")
        if self.gguf:
            others = [self.gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
            found = [token for token in (found, *others) if token is not None]
        return sorted(set(found)) if isinstance(found, list) else [] if found is None else [found]


def resolve(model: str) -> Source:
    """The model that a user's string means.

    Args:
        model: a directory with `config.json`, a `.gguf` file, or a hub id such as org/name.

    Raises:
        UserError: there is no such thing, or the hub does not give it out.

    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{model} holds no config.json, so it is not a Hugging Face model directory.")
        return Source(str(path.resolve()), path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{model} is a file, but not a .gguf one. Give the model's directory or a .gguf file.")
        return Source(str(path.resolve()), path, open_gguf(path))
    if _HUB_ID.fullmatch(model) and not model.startswith((".", "/")):
        return Source(model, _download(model))
    raise UserError(f"{model} does not exist. Give a directory with config.json, a .gguf file or a hub id (org/name).")


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer saved in a directory, or None where there is none.

    Raises:
        UserError: there is one and it cannot be read.

    """
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{path}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise UserError(
            f"{name} is gated. Accept its licence on its hub page, then run 'hf auth login' or set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a path here nor a model on the hub. For a private one, run 'hf auth login'."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not a path here, and the hub cannot be reached{offline}: {reason}") from None
