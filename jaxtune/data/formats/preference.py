"""Pairs of a preferred and a rejected answer to one prompt."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtune.core.errors import listed
from jaxtune.data.formats import messages, prompt_completion
from jaxtune.data.formats.columns import apply_columns
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row, RowError


class PreferencePair(NamedTuple):
    """Two conversations with the same prompt."""

    chosen: Conversation
    rejected: Conversation


def _read(row: Row, answered: bool) -> Conversation:
    """Refuse the row: a pair is no single conversation. `read_pair` reads it."""
    raise RowError(
        row.location,
        "a pair of preferences, which is for train.objective=dpo, simpo, orpo or kto. "
        "To train on the preferred answers: data.format=prompt-completion "
        "data.columns={completion: chosen}.",
    )


def read_pair(row: Row, columns: Mapping[str, str] | None = None) -> PreferencePair:
    """Return the two answers of a row, each with its prompt.

    The answers are texts after `prompt`, or messages; where `prompt` is missing, they hold it as
    their common beginning.

    Args:
        row: the parsed row.
        columns: see `registry.read_conversation`.

    Raises:
        RowError: a key is missing or of the wrong type, or the two do not answer the same prompt.

    """
    value = apply_columns(row, columns or {}).value
    prompt = {"prompt": value["prompt"]} if value.get("prompt") is not None else {}

    def read_answer(key: str) -> Conversation:
        if key not in value:
            raise RowError(row.location, f"the key '{key}' is missing; there are {listed(value)}.")
        if isinstance(value[key], list) and not isinstance(prompt.get("prompt"), list):
            return messages.FORMAT.read(Row(row.location, {"messages": value[key]}), True)
        completion = {**prompt, "completion": value[key]}
        return prompt_completion.FORMAT.read(Row(row.location, completion), True)

    pair = PreferencePair(read_answer("chosen"), read_answer("rejected"))
    if pair.chosen.prompt != pair.rejected.prompt:
        raise RowError(row.location, "'chosen' and 'rejected' do not answer the same prompt.")
    return pair


FORMAT = DataFormat("preference", lambda keys: keys >= {"chosen", "rejected"}, _read, precedence=3)
