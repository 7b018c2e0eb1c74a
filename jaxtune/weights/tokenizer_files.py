"""A tokenizer's files in Hugging Face's format, beside a model's weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxtune.core.errors import UserError
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
    if not any((directory / name).exists() for name in TOKENIZER_FILES[:4]):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{directory}: the tokenizer cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def save_tokenizer(directory: Path, files: Sequence[Path], tokenizer: Tokenizer | None) -> None:
    """Copy the source's own files byte by byte; where it has none, save the tokenizer as
    transformers does.
    """
    for file in files:
        shutil.copyfile(file, directory / file.name)
    if not files and tokenizer is not None:
        tokenizer.save_pretrained(directory)
