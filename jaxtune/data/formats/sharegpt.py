"""ShareGPT's rows: `{"conversations": [{"from": "human", "value": ...}, ...]}`."""

from typing import Any

from jaxtune.core.errors import listed
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.fields import (
    check_weight,
    read_messages,
    read_system,
    read_template_options,
)
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row, RowError

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


def _read(row: Row, answered: bool) -> Conversation:
    """Return the conversation in a row; see `DataFormat.read`.

    Turns that have a role instead of `from` are read as messages.
    """
    key = "conversations" if "conversations" in row.value else "conversation"
    turns = row.value.get(key)
    if not isinstance(turns, list) or not turns:
        raise RowError(row.location, f"'{key}' is not a list with at least one turn.")
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        messages = read_messages(row, key)
    else:
        messages = read_system(row) + [
            _message_of(turn, f"{row.location}: {key}[{number}]")
            for number, turn in enumerate(turns)
        ]
    return Conversation(row.location, messages, options=read_template_options(row))


def _message_of(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise RowError(where, "not an object with 'from' and a text as 'value'.")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RowError(where, f"unknown speaker {speaker!r}; known are {listed(_ROLES, 20)}.")
    message = {"role": _ROLES[speaker], "content": turn["value"]}
    if turn.get("weight") is not None:
        message["weight"] = check_weight(turn["weight"], where)
    return message


FORMAT = DataFormat(
    "sharegpt", lambda keys: bool(keys & {"conversations", "conversation"}), _read, precedence=1
)
