"""All formats by name. A new one is a module here that defines `FORMAT`, and its name in the
schema's `data.format`.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, get_args

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import listed
from jaxtune.data.formats.columns import apply_columns
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row, RowError

AUTO = "auto"


@cache
def data_formats() -> dict[str, DataFormat]:
    """Return all formats; `prompt-completion` is defined in the module `prompt_completion`."""
    names = get_args(DataSection.model_fields["format"].annotation)
    return {
        name: import_module(f"{__package__}.{name.replace('-', '_')}").FORMAT
        for name in names
        if name != AUTO
    }


def detect_format(value: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the name of the format that a row's keys match; None where they match none.

    Args:
        value: the row.
        columns: see `read_conversation`; their keys count as the row's.

    """
    keys = value.keys() | columns.keys()
    by_precedence = sorted(data_formats().values(), key=lambda format: -format.precedence)
    return next((format.name for format in by_precedence if format.matches(keys)), None)


def read_conversation(
    row: Row, kind: str = AUTO, *, columns: Mapping[str, str] | None = None, answered: bool = True
) -> Conversation:
    """Return the conversation in a row.

    Args:
        row: the parsed row.
        kind: a format, or `auto` to go by the row's keys.
        columns: for keys of the format the column that has it, or a text with columns in braces.
        answered: whether a prompt needs a completion (training and evaluation need one, generation
            does not).

    Raises:
        RowError: no known format, a key that is missing or of the wrong type, an unknown role; with
            file and line.

    """
    columns = columns or {}
    name = detect_format(row.value, columns) if kind == AUTO else kind
    if not name:
        raise RowError(
            row.location,
            f"none of the formats {listed(data_formats())} matches the keys {listed(row.value)}. "
            "Say which columns hold what, for example "
            "data.columns={prompt: question, completion: answer}.",
        )
    return data_formats()[name].read(apply_columns(row, columns), answered)
