"""A conversation as text, with the answers in it that are trained."""

from typing import NamedTuple

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.sources.row import RowError


class Span(NamedTuple):
    """Characters (or tokens) from `begin` to before `end`, whose prediction has this weight."""

    begin: int
    end: int
    weight: float


class Rendering(NamedTuple):
    """A conversation as text.

    Attributes:
        conversation: what was rendered; one answer's part of a row where the template rewrites
            earlier turns.
        text: the whole.
        spans: the answers in it that are trained.
        rewritten: whether the row was split into one rendering an answer, because the template
            renders an answer differently once other messages follow.

    """

    conversation: Conversation
    text: str
    spans: tuple[Span, ...]
    rewritten: bool = False


def require_text(text: str | RowError) -> str:
    """Return a text; raise the error that stands in its place."""
    if isinstance(text, RowError):
        raise text
    return text


def answer_numbers(conversation: Conversation, train_on: str) -> list[int]:
    """Return the numbers of the assistant's messages that are trained.

    Args:
        conversation: the messages.
        train_on: `responses`, `last`, or `all`, for which there are none: all is trained.

    """
    if train_on == "all":
        return []
    numbers = assistant_numbers(conversation)
    return [
        number
        for number in (numbers[-1:] if train_on == "last" else numbers)
        if weight_of(conversation, number) > 0
    ]


def assistant_numbers(conversation: Conversation) -> list[int]:
    """Return the numbers of the assistant's messages."""
    return [
        number
        for number, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]


def weight_of(conversation: Conversation, number: int) -> float:
    """Return the weight of a message, 1 where it says none."""
    return conversation.messages[number].get("weight", 1.0)
