"""Errors that end a command, and helpers for their messages."""

import difflib
import errno
from collections.abc import Iterable

_ADVICE = {
    errno.ENOSPC: "the disk is full. Make room, and start again",
    errno.EDQUOT: "the disk quota is used up. Make room, and start again",
    errno.EFBIG: "the file may not grow so large (ulimit -f). Raise the limit, and start again",
    errno.EROFS: "the file system is read-only. Choose another directory",
    errno.EACCES: "no permission. Choose another place, or change its permissions",
    errno.EPERM: "no permission. Choose another place, or change its permissions",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter one",
    errno.ENOTDIR: "a file is where a directory should be. Choose another place, or move it away",
    errno.EEXIST: "a file is where a directory should be. Choose another place, or move it away",
    errno.EISDIR: "a directory is where a file should be. Choose another name",
    errno.ENOENT: "there is no such file or directory",
    errno.ELOOP: "a symbolic link leads back to itself. Remove it",
    errno.EIO: "the device failed to read or write. What was saved before is kept",
    errno.ESTALE: "the network file system has lost the file. Start again",
    errno.EMFILE: "too many open files (ulimit -n). Raise the limit, and start again",
}
_OF_THE_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE,
)  # fmt: skip


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


def describe_os_error(error: OSError) -> str | None:
    """Return in one line which file the system refused, why, and what to do; None where the error
    is of no file.
    """
    if error.errno not in _ADVICE:
        return None
    name = error.filename
    place = f"{name.decode(errors='replace') if isinstance(name, bytes) else name}: "
    return f"{place if name is not None else ''}{_ADVICE[error.errno]}."


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def status(error: BaseException) -> int:
    """Return the exit status of a command that ends with this error: 2 where the user can mend the
    command, 1 where the machine or the run failed.
    """
    if isinstance(error, OSError) and error.errno in _ADVICE:
        return 1 if error.errno in _OF_THE_MACHINE else 2
    return 2 if isinstance(error, UserError) else 1
