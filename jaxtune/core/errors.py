"""Errors that end a command, and helpers for their messages."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong usage or wrong input; the message says what is wrong, where, and how to fix it.

    The command line prints it as one message without a traceback and exits with 2.
    """


class RunError(Exception):
    """The failure of a run that was set up correctly, such as a NaN or an unverified export.

    The command line prints it as one message without a traceback and exits with 1.
    """


class Interrupted(Exception):
    """The end of a run that a signal stopped, and that has saved its state.

    Attributes:
        number: the signal's number.

    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return the suffix ' Did you mean X?' for an unknown name, or '' where none is close.

    Args:
        name: what the user wrote.
        candidates: the valid names.

    """
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return names in one line: at most `limit`, and the number of the rest."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def status(error: BaseException) -> int:
    """Return the exit status of a command that ends with this error."""
    return 2 if isinstance(error, UserError) else 1
