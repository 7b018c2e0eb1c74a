"""Errors that are the user's to mend, and the helper that suggests the right name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong usage or wrong input: says what is wrong, where, and how to mend it.

    The command line prints it as one message without a traceback and exits with 2.
    """


class RunError(Exception):
    """A run that was set up correctly and failed (a NaN, an export that does not verify).

    The command line prints it as one message without a traceback and exits with 1.
    """


class Interrupted(Exception):
    """The run was asked to stop, and has saved.

    Attributes:
        number: the signal's number.

    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A ' Did you mean X?' suffix for an unknown `name`, or '' when nothing is near.

    Args:
        name: what the user wrote.
        candidates: the names that would have been right.

    """
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Names in one line, cut after `limit` with a count of the rest."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def status(error: BaseException) -> int:
    """The exit status of a command that ends with this error."""
    return 2 if isinstance(error, UserError) else 1
