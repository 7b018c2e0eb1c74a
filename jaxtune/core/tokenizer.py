"""What this package needs of a tokenizer; transformers' fast tokenizers have it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A tokenizer as `transformers.AutoTokenizer` loads it.

    Attributes:
        chat_template: the Jinja template of conversations; None where it has none.
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: ids of the special tokens; None
            where it has none.
        special_tokens_map, all_special_tokens, all_special_ids, added_tokens_decoder: its special
            tokens.
        backend_tokenizer: the `tokenizers.Tokenizer` inside.
        name_or_path: where it was loaded from.

    """

    chat_template: Any
    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any
    unk_token_id: Any
    special_tokens_map: Any
    all_special_tokens: Any
    all_special_ids: Any
    added_tokens_decoder: Any
    backend_tokenizer: Any
    name_or_path: Any

    def __call__(self, text: Any, **options: Any) -> Any:
        """Encode one text, or several; `["input_ids"]` holds the ids."""
        ...

    def encode(self, text: Any, **options: Any) -> Any:
        """Return the ids of one text."""
        ...

    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> str:
        """Return the chat template, of several the one that fits."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation, as text or as ids."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Decode the ids of one text."""
        ...

    def batch_decode(self, sequences: Any, **options: Any) -> Any:
        """Decode the ids of several texts."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return every token with its id."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the tokens of these ids."""
        ...

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> Any:
        """Return the ids of these tokens."""
        ...

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens and return how many are new."""
        ...

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
        """Write the tokenizer's files into a directory."""
        ...
