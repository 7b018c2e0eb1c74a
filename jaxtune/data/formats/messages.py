"""OpenAI's chat rows: `{"messages": [{"role": ..., "content": ...}, ...]}`."""

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.fields import read_accepted, read_messages, read_template_options
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row


def _read(row: Row, answered: bool) -> Conversation:
    """Return the conversation in a row; see `DataFormat.read`."""
    return Conversation(
        row.location,
        read_messages(row, "messages"),
        options=read_template_options(row),
        accepted=read_accepted(row),
    )


FORMAT = DataFormat("messages", lambda keys: "messages" in keys, _read, precedence=1)
