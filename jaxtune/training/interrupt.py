"""Ctrl-C, SIGTERM and a terminal that is closed end a run after the current step, with a
checkpoint; where there are several processes, all of them after the same step.
"""

import os
import signal
from types import FrameType

from jaxtune.core import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(Exception):
    """A signal has asked the run to stop while it evaluated."""


class StopRequest:
    """A request to stop: while entered, the first signal is remembered, and a second Ctrl-C or
    SIGTERM ends the process as usual. A signal that is ignored, as nohup has it of SIGHUP, stays
    so.

    Where there are several processes, JAX's service handles SIGTERM and agrees with all of them on
    a moment. The other signals are passed on as SIGTERM.

    Attributes:
        number: the signal that has come, if one has.

    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._questions = 0
        self._shared = distributed.is_multiprocess()
        self._is_entered = False

    def __enter__(self) -> "StopRequest":
        mine = [
            number
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
            and not (self._shared and number == signal.SIGTERM)
        ]
        self._terminals = [handle for handle in (1, 2) if os.isatty(handle)]
        self._before = {number: signal.signal(number, self._remember) for number in mine}
        self._is_entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_entered = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def signalled(self) -> int | None:
        """Return the signal that ends the run, if any; all processes ask equally often."""
        if not self._shared:
            return self.number
        from jax.experimental import multihost_utils

        self._questions += 1
        is_reached = multihost_utils.reached_preemption_sync_point(self._questions)
        if is_reached:
            self.number = signal.SIGTERM
        return self.number

    def check(self) -> None:
        """Raise where a signal has asked the run to stop; does nothing unless entered.

        Raises:
            StopRequested: it has.

        """
        if self._is_entered and self.signalled() is not None:
            raise StopRequested

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminals()
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.number = number
        for other, handler in self._before.items():
            if other != signal.SIGHUP:  # one that is closed sends several
                signal.signal(other, handler)

    def _leave_terminals(self) -> None:
        """Write to nowhere what would go to a terminal that is gone: each write would fail."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in self._terminals:
            os.dup2(nowhere, handle)
        os.close(nowhere)
        self._terminals = []
