"""A prompt and its completion, as texts or as lists of messages."""

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.fields import (
    read_accepted,
    read_messages,
    read_template_options,
    read_text,
)
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row


def _read(row: Row, answered: bool) -> Conversation:
    """Return the conversation in a row; see `DataFormat.read`."""
    completed = answered or "completion" in row.value
    if isinstance(row.value.get("prompt"), list):
        messages = read_messages(row, "prompt")
        if completed:
            messages += read_messages(row, "completion")
        return Conversation(
            row.location,
            messages,
            options=read_template_options(row),
            accepted=read_accepted(row),
        )
    messages = [{"role": "user", "content": read_text(row, "prompt")}]
    if completed:
        messages.append({"role": "assistant", "content": read_text(row, "completion")})
    return Conversation(row.location, messages, plain=True, accepted=read_accepted(row))


FORMAT = DataFormat("prompt-completion", lambda keys: "prompt" in keys, _read)
