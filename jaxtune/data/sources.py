"""Rows of a data file with the line each came from."""

import json
from dataclasses import dataclass
from pathlib import Path

from jaxtune.core.errors import UserError


@dataclass(frozen=True)
class Row:
    """One line of a JSON Lines file.

    Attributes:
        place: file and line, for messages.
        value: the parsed object.

    """

    place: str
    value: dict


def read_rows(path: str) -> list[Row]:
    """All rows of a JSON Lines file; blank lines are skipped.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or has a line that is not a JSON object, with its number.

    """
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} is not a file. Give a JSON Lines file with messages or prompt/completion rows.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place}: not valid JSON: {error}. Each line must be one JSON object.") from None
        if not isinstance(value, dict):
            raise UserError(f"{place}: a {type(value).__name__} instead of a JSON object with messages or prompt/completion.")
        rows.append(Row(place, value))
    if not rows:
        raise UserError(f"{path} has no rows.")
    return rows
