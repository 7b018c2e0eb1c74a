"""A tokenizer's files in Hugging Face's format, beside a model's weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxtune.core.errors import UserError, first_line, is_panic
from jaxtune.core.files import check_directory
from jaxtune.core.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer saved in a directory, or None where there is none.

    Raises:
        UserError: the tokenizer's files cannot be read.

    """
    check_directory(directory)
    if not any((directory / name).exists() for name in TOKENIZER_FILES[:4]):
        return None
    from transformers import AutoTokenizer

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


def save_tokenizer(directory: Path, files: Sequence[Path], tokenizer: Tokenizer | None) -> None:
    """Copy the source's own files byte by byte; where it has none, save the tokenizer as
    transformers does.
    """
    for file in files:
        shutil.copyfile(file, directory / file.name)
    if not files and tokenizer is not None:
        tokenizer.save_pretrained(directory)
