"""Regular expressions of users and of files: a search that takes too long is an error."""

import re
from typing import Any

import regex

from jaxtune.core.errors import UserError

_SECONDS = 1.0


def fullmatch(pattern: str, text: str) -> Any:
    """Return the match of a regular expression that describes a whole text, or None.

    Raises:
        re.error: it is none.
        UserError: it takes seconds, or uses what only Python's own engine knows.

    """
    re.compile(pattern)
    try:
        return regex.fullmatch(pattern, text, timeout=_SECONDS)
    except TimeoutError:
        raise UserError(
            f"The regular expression {pattern!r} takes more than {_SECONDS:.0f} second on "
            f"{text!r}. Write it without repetitions of repetitions, or list the names."
        ) from None
    except regex.error as error:
        raise UserError(f"The regular expression {pattern!r} cannot be used: {error}.") from None
