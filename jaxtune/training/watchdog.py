"""The watchdog: where a step hangs, it prints the stacks of all threads and ends the run, so that a
scheduler can start it again.
"""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

from jaxtune.core import distributed
from jaxtune.core.errors import RunError


class Watchdog:
    """A guard that, while entered, ends all processes of the run after `seconds` without `alive`.

    Args:
        seconds: how long a step may take; None: forever.
        expire: called with the seconds and the step when the time is over; by default it prints the
            stacks and ends the processes.

    """

    def __init__(
        self, seconds: float | None, expire: Callable[[float, str], None] | None = None
    ) -> None:
        self._seconds, self._expire = seconds, expire or _end
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._doing, self._over = "", False

    def __enter__(self) -> "Watchdog":
        self.alive("the first step, which is compiled")
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="jaxtune-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()

    def alive(self, doing: str) -> None:
        """Start the time anew: something was done, and `doing` is what comes next."""
        with self._changed:
            self._doing = doing
            self._deadline = None if self._seconds is None else time.monotonic() + self._seconds
            self._changed.notify()

    def rest(self) -> None:
        """Stop the time until `alive`: what comes next may take as long as it wants."""
        with self._changed:
            self._deadline = None
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._over:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if self._over:
                return
        assert self._seconds is not None
        self._expire(self._seconds, self._doing)


def _end(seconds: float, doing: str) -> None:
    """Print where every thread stands, and end."""
    distributed.say_error(f"{doing} is not done after {seconds:.0f} s; every thread stands at:")
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    distributed.fail_all(
        RunError(
            f"{doing} was not done after {seconds:.0f} s, so the run was ended; the checkpoints "
            "before it are kept. If steps may take this long, set run.watchdog higher, or to null."
        )
    )
