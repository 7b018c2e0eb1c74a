"""What a row says: a conversation, whatever keys it is written with."""

from dataclasses import dataclass
from typing import Any

from jaxtune.core.errors import UserError, listed, nearest
from jaxtune.data.sources import Row

ROLES = ("system", "user", "assistant", "tool")
MESSAGES, PROMPT_COMPLETION = "messages", "prompt-completion"


@dataclass(frozen=True)
class Conversation:
    """A row's messages.

    Attributes:
        place: file and line, for messages.
        messages: dictionaries with role and content.
        plain: whether it was written as prompt and completion, and so needs no chat template.

    """

    place: str
    messages: list[dict[str, Any]]
    plain: bool

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the last answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The last message where the assistant says it."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else None


def conversation(row: Row, kind: str = "auto", *, answered: bool = True) -> Conversation:
    """The conversation in a row.

    Args:
        row: the parsed row.
        kind: `messages`, `prompt-completion`, or `auto` to go by the row's keys.
        answered: whether a prompt needs a completion (training and evaluation do, generation does not).

    Raises:
        UserError: neither format, a key that is missing or of the wrong type, an unknown role; with file and line.

    """
    if kind == "auto":
        kind = MESSAGES if "messages" in row.value else PROMPT_COMPLETION if "prompt" in row.value else ""
    if kind == MESSAGES:
        return Conversation(row.place, _messages(row), plain=False)
    if kind == PROMPT_COMPLETION:
        texts = [_text(row, "prompt")]
        if answered or "completion" in row.value:
            texts.append(_text(row, "completion"))
        roles = ("user", "assistant")
        return Conversation(
            row.place, [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], plain=True
        )
    raise UserError(f"{row.place}: neither 'messages' nor 'prompt' and 'completion' among the keys {listed(row.value)}.")


def _text(row: Row, key: str) -> str:
    if key not in row.value:
        raise UserError(f"{row.place}: the key '{key}' is missing; there are {listed(row.value)}.{nearest(key, row.value)}")
    if not isinstance(row.value[key], str):
        raise UserError(f"{row.place}: '{key}' is of type {type(row.value[key]).__name__}, not a string.")
    return row.value[key]


def _messages(row: Row) -> list[dict[str, Any]]:
    messages = row.value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{row.place}: 'messages' is not a list with at least one message.")
    for number, message in enumerate(messages):
        where = f"{row.place}: messages[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"{where} is not an object with role and content.")
        if message["role"] not in ROLES:
            raise UserError(
                f"{where}: unknown role {message['role']!r}; roles are {listed(ROLES)}.{nearest(str(message['role']), ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: 'content' is not a string.")
    return messages
