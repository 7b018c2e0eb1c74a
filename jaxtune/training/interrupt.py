"""Ctrl-C and SIGTERM end a run after the current step, with a checkpoint; where there are several
processes, all of them after the same step.
"""

import os
import signal
from types import FrameType

from jaxtune.core import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A request to stop: while entered, the first signal is remembered, and a second one ends the
    process as usual.

    Where there are several processes, JAX's service handles SIGTERM and agrees with all of them on
    a step. Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._shared = distributed.is_multiprocess()

    def __enter__(self) -> "StopRequest":
        mine = (signal.SIGINT,) if self._shared else SIGNALS
        self._before = {number: signal.signal(number, self._remember) for number in mine}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after(self, step: int) -> int | None:
        """Return the signal that ends the run after this step, if any; call it once per step."""
        if not self._shared:
            return self._number
        from jax.experimental import multihost_utils

        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._number = number
        for other, handler in self._before.items():
            signal.signal(other, handler)
