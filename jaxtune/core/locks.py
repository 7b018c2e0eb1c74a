"""Locks on files and folders, which end with the process that holds them."""

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT_TELL = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockHeldError(Exception):
    """Another process holds the lock; the message says which."""


class Lock:
    """A lock file that this process holds until `close`.

    The file stays: where it were removed, two processes could hold locks on two files of one name.

    Args:
        path: the file.

    Attributes:
        is_sure: whether the file system can tell that no other process holds it. Local disks and
            NFS can.

    Raises:
        LockHeldError: another process holds it.
        OSError: the file cannot be made.

    """

    def __init__(self, path: Path) -> None:
        while True:
            self._file = path.open("a+", encoding="utf-8", errors="replace")
            self.is_sure = self._try()
            try:
                if os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
                    break
            except FileNotFoundError:
                pass
            self._file.close()  # somebody has removed the file that is locked
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.readline(200) or "another process"
            self._file.close()
            raise LockHeldError(holder) from None
        except OSError as error:
            if error.errno not in _CANNOT_TELL:
                raise
            return False
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; other processes and threads wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold a lock on a file or folder, if nobody else does and the file system can; yield whether
    it is held.
    """
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held = True
    except OSError:
        is_held = False
    try:
        yield is_held
    finally:
        if handle is not None:
            os.close(handle)
