"""`data.columns`: keys of a format taken from other columns of the row."""

import json
import re
from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import listed, nearest
from jaxtune.data.sources.row import Row, RowError

_FIELD = re.compile(r"\{([^{}]+)\}")


def apply_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with the keys of `columns` filled in.

    Raises:
        RowError: a column that is missing.

    """
    if not columns:
        return row
    return Row(
        row.location,
        dict(row.value) | {key: _column_value(row, column) for key, column in columns.items()},
    )


def _column_value(row: Row, column: str) -> Any:
    """Return the value of a column, of a path such as answers.text.0, or of a text with columns in
    braces.
    """
    if column in row.value:
        return row.value[column]
    if not _FIELD.search(column):
        return _value_at(row, column)

    def fill_in(match: re.Match[str]) -> str:
        value = _value_at(row, match[1])
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return _FIELD.sub(fill_in, column)


def _value_at(row: Row, path: str) -> Any:
    value: Any = row.value
    for step in [path] if path in row.value else path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise RowError(
                row.location,
                f"the column '{path}' of data.columns is missing; there are "
                f"{listed(row.value)}.{nearest(path, row.value)}",
            )
    return value
