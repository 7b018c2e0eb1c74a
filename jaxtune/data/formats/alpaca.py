"""Stanford Alpaca's rows: an instruction, an input and an output."""

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.fields import read_system, read_text
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row, RowError


def _read(row: Row, answered: bool) -> Conversation:
    """Return the conversation in a row; see `DataFormat.read`.

    The input stands below the instruction, after a blank line.
    """
    instruction = read_text(row, "instruction")
    if row.value.get("input"):
        instruction = f"{instruction}\n\n{read_text(row, 'input')}"
    messages = read_system(row)
    history = row.value.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        if not (
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(text, str) for text in turn)
        ):
            raise RowError(row.location, "'history' is not a list of pairs of texts.")
        messages.append({"role": "user", "content": turn[0]})
        messages.append({"role": "assistant", "content": turn[1]})
    messages.append({"role": "user", "content": instruction})
    if answered or "output" in row.value:
        messages.append({"role": "assistant", "content": read_text(row, "output")})
    return Conversation(row.location, messages)


FORMAT = DataFormat("alpaca", lambda keys: keys >= {"instruction", "output"}, _read)
