"""A row of a data file, and where it stands."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.core.errors import UserError

LONGEST = 64 << 20
"""Bytes of the longest row that is read; a longer one is a bad row."""


class RowLocation(NamedTuple):
    """File and line, from 1; where there are no lines, the number of the row. Line 0 means the
    whole file.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Row:
    """One object of a data file.

    Attributes:
        location: where it stands.
        value: the object.

    """

    location: RowLocation
    value: dict[str, Any]


class RowError(UserError):
    """A row that cannot be trained on; `data.on_error` says whether it ends the run or is left
    out and listed.
    """

    def __init__(self, location: RowLocation | str, reason: str) -> None:
        super().__init__(f"{location}: {reason}")


class RowErrors:
    """The bad rows of a source.

    Args:
        on_error: `raise` ends at the first, `skip` collects them.

    Attributes:
        messages: what is wrong with the rows left out, each with its location.

    """

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.messages: list[str] = []

    def add(self, bad: UserError) -> None:
        """Record a bad row.

        Raises:
            UserError: `bad` itself, unless bad rows are skipped.

        """
        if self.on_error == "raise":
            raise UserError(f"{bad} (data.on_error=skip leaves such rows out and lists them.)")
        self.messages.append(str(bad))
