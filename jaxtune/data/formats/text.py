"""Raw text: `{"text": ...}`."""

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.fields import read_text
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row


def _read(row: Row, answered: bool) -> Conversation:
    """Return the text in a row; see `DataFormat.read`."""
    messages = [{"role": "assistant", "content": read_text(row, "text")}]
    return Conversation(row.location, messages, text=True)


FORMAT = DataFormat("text", lambda keys: "text" in keys, _read)
