"""A conversation, whatever format its row is written in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from jaxtune.data.sources.row import RowLocation


@dataclass(frozen=True)
class Conversation:
    """A row's messages.

    Attributes:
        location: file and line, for errors.
        messages: dictionaries with role and content, as chat templates want them.
        plain: whether it was written as a prompt and its completion, and so needs no chat template.
        text: whether it is one text without roles, the content of its single message.
        options: what else the chat template is given: tools, and the row's `chat_template_kwargs`.
        label: what the answer is where answers are compared; see `batch.CHOSEN`.
        choices: the answers to choose from, where the row lists them.
        accepted: other answers that are right too.

    """

    location: RowLocation | str
    messages: list[dict[str, Any]]
    plain: bool = False
    text: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    label: int = 0
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Return the messages before the last answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """Return the content of the last message if it is the assistant's; else None."""
        last = self.messages[-1]
        return last.get("content") or "" if last["role"] == "assistant" else None

    def digests(self) -> tuple[int, int, int]:
        """Return 64-bit hashes of the whole, of the prompt (of the whole where there is none), and
        of the answer.
        """
        before, answer = blake2b(digest_size=8), blake2b(digest_size=8)
        for message in self.prompt:
            before.update(_canonical(message))
        whole = before.copy()
        if self.answer is not None:
            answer.update(_canonical(self.messages[-1]))
            whole.update(_canonical(self.messages[-1]))
        prompt = whole if len(self.prompt) == 0 else before
        row_hash, prompt_hash, answer_hash = (
            int.from_bytes(hasher.digest(), "little") for hasher in (whole, prompt, answer)
        )
        return row_hash, prompt_hash, answer_hash

    def through(self, number: int) -> "Conversation":
        """Return the conversation up to and including message `number`."""
        return replace(self, messages=self.messages[: number + 1])

    def before(self, number: int) -> "Conversation":
        """Return the conversation up to and excluding message `number`."""
        return replace(self, messages=self.messages[:number])


def _canonical(message: Mapping[str, Any]) -> bytes:
    """Return bytes that two messages share only if they say the same."""
    if len(message) == 2 or message.keys() == {"role", "content", "weight"}:
        return f"{message['role']}\0{message['content']}\0".encode("utf-8", "surrogatepass")
    return json.dumps(message, sort_keys=True, default=str).encode() + b"\0"
