"""A row of a data file, and the place it stands at."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.core.errors import UserError


class RowLocation(NamedTuple):
    """File and line, from 1; of what has no lines, the number of the row. Line 0 means the file
    as a whole.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Row:
    """One object of a data file.

    Attributes:
        place: where it stands.
        value: the object.

    """

    place: RowLocation
    value: dict[str, Any]


class RowError(UserError):
    """A row that cannot be trained on; `data.on_error` says whether it ends the run or is left
    out and listed.
    """

    def __init__(self, place: RowLocation | str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")


class RowErrors:
    """What becomes of bad rows.

    Args:
        on_error: `raise` ends at the first, `skip` collects them.

    Attributes:
        found: what is wrong with the rows left out, each with its place.

    """

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.found: list[str] = []

    def add(self, bad: UserError) -> None:
        """Take note of a bad row.

        Raises:
            UserError: `bad` itself, where bad rows are not to be skipped.

        """
        if self.on_error == "raise":
            raise UserError(f"{bad} (data.on_error=skip leaves such rows out and lists them.)")
        self.found.append(str(bad))
