"""A tokenizer's files in Hugging Face's format, beside a model's weights."""

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError, first_line, is_panic
from jaxtune.core.files import check_directory, read_json, write_json
from jaxtune.core.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_FAST = ("tokenizer.json", "vocab.json")
TEMPLATES = "additional_chat_templates"
_CONFIG = "tokenizer_config.json"
_SPECIAL = {
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
}  # fmt: skip
_SETTINGS: dict[str, tuple[type, ...]] = {
    "chat_template": (str, list, dict), "tokenizer_class": (str,), "added_tokens_decoder": (dict,),
    "extra_special_tokens": (list, dict), "additional_special_tokens": (list,),
    "model_max_length": (int, float), "add_bos_token": (bool,), "add_eos_token": (bool,),
}  # fmt: skip
# Names of transformers 5 for a tokenizer that has no class of its own.
_UNNAMED = ("TokenizersBackend", "PreTrainedTokenizerBase")


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files in a directory that its tokenizer is read from, chat templates among
    them.
    """
    files = (directory / name for name in TOKENIZER_FILES)
    templates = sorted((directory / TEMPLATES).glob("*.jinja"))
    return [file for file in (*files, *templates) if file.is_file()]


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer saved in a directory, or None where there is none.

    Raises:
        UserError: the tokenizer's files cannot be read.

    """
    check_directory(directory)
    if not any((directory / name).exists() for name in TOKENIZER_FILES[:4]):
        return None
    _require_sentencepiece(directory)
    from transformers import AutoTokenizer

    _check_settings(directory / _CONFIG)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(
            f"{_named(directory)}: the tokenizer cannot be loaded: {type(error).__name__}: "
            f"{first_line(error)}. Download or save it again."
        ) from None


def _named(directory: Path) -> Path:
    """Return the tokenizer's file where it is the one that cannot be read."""
    file = directory / "tokenizer.json"
    return file if file.exists() and not _is_read(file) else directory


def _is_read(file: Path) -> bool:
    from tokenizers import Tokenizer as Backend

    try:
        Backend.from_file(str(file))
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return False
    return True


def _check_settings(path: Path) -> None:
    """Check the types of what `tokenizer_config.json` says.

    Raises:
        UserError: a value has another; with file and key.

    """
    raw = read_json(path) if path.is_file() else {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object. Download the file again.")
    for key, value in raw.items():
        kinds = (str, dict) if key in _SPECIAL else _SETTINGS.get(key)
        if kinds is None or value is None:
            continue
        is_valid = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if key == "chat_template" and isinstance(value, list):
            is_valid = all(
                isinstance(template, dict)
                and all(isinstance(template.get(part), str) for part in ("name", "template"))
                for template in value
            )
        if not is_valid:
            raise UserError(
                f"{path}: {key} {value!r:.60} is not what a tokenizer can have there. Download the "
                "file again."
            )


def _require_sentencepiece(directory: Path) -> None:
    """Check that a `tokenizer.model` that stands alone can be read: transformers asks for other
    packages where it cannot.

    Raises:
        UserError: it needs a package that is not installed, or is in another format.

    """
    path = directory / "tokenizer.model"
    if not path.is_file() or any((directory / name).exists() for name in _FAST):
        return
    with path.open("rb") as file:
        is_sentencepiece = file.read(1) == b"\n"  # the first field of its protocol buffer
    if not is_sentencepiece:
        raise UserError(
            f"{path} is not a file of sentencepiece, as Llama 3's own are in another format. Put "
            "the tokenizer.json of the model's page on the hub beside it."
        )
    if find_spec("sentencepiece") is None:
        raise UserError(
            f"{path} needs sentencepiece: pip install 'jaxtune[sentencepiece]', or put a "
            "tokenizer.json beside it."
        )


def save_tokenizer(directory: Path, files: Sequence[Path], tokenizer: Tokenizer | None) -> None:
    """Write a tokenizer with its chat templates.

    Its own files are copied byte by byte; where there are none, or training changed the tokenizer
    since it was read from them, it is saved as transformers does. What of `tokenizer_config.json`
    only transformers 5 would understand is said in the words of 4, which both read.

    Args:
        directory: where to.
        files: what it was read from.
        tokenizer: None where there is none.

    """
    for file in files:
        folder = directory / TEMPLATES if file.parent.name == TEMPLATES else directory
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.name)
    if tokenizer is not None and not (files and _reads_as(directory, tokenizer)):
        shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
        for name in TOKENIZER_FILES:
            (directory / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(directory)
    _write_common_dialect(directory)


def _reads_as(directory: Path, tokenizer: Tokenizer) -> bool:
    try:
        copy = load_tokenizer(directory)
    except UserError:  # of files that need a config.json beside them
        return False
    return copy is not None and is_same(copy, tokenizer)


def is_same(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two tokenizers have the same tokens, special tokens and chat templates."""
    return _content(first) == _content(second)


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what makes two tokenizers the same, which is not how they pad and truncate."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "backend": raw | {"truncation": None, "padding": None},
        "templates": tokenizer.chat_template,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }


def _write_common_dialect(directory: Path) -> None:
    path = directory / _CONFIG
    raw = read_json(path) if path.exists() else None
    if not isinstance(raw, dict):
        return
    content = dict(raw)
    if raw.get("tokenizer_class") in _UNNAMED and (directory / "tokenizer.json").exists():
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(raw.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    if content != raw:
        write_json(path, content)
