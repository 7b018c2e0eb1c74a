"""Which process of a run has died: each says every second that it lives, and the main one listens.

JAX's own heartbeat, which ends the others with a stack in C++, names nobody, so that the main
process says it before. This heartbeat ends nothing: a process that is busy may be silent for a
while.
"""

import contextlib
import time
from itertools import count
from typing import Any

SILENCE = 10.0
"""Seconds after which a process that is not heard of is taken for dead, if others failed too."""
_ALIVE, _ENDED, _GRACE = "jaxtune/alive", "ended", 5.0


class Heartbeats:
    """The heartbeats of a run's processes.

    Args:
        client: the processes' key-value store.
        index: the number of this process.

    """

    def __init__(self, client: Any, index: int) -> None:
        self._client, self._index, self._numbers = client, index, count()
        self._heard: dict[int, tuple[str, float]] = {}
        self._told: set[int] = set()

    def beat(self) -> None:
        """Say that this process lives."""
        self._say(str(next(self._numbers)))

    def end(self) -> None:
        """Say that this process ends as it should."""
        self._say(_ENDED)

    def listen(self) -> None:
        """Note which processes have been heard of since the last time."""
        import jax

        now = time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for key, beat in self._client.key_value_dir_get(_ALIVE):
                number = int(key.rpartition("/")[2])
                if self._heard.get(number, ("", 0.0))[0] != beat:
                    self._heard[number] = beat, now

    def silent(self) -> list[int]:
        """Return the processes that have not been heard of for `SILENCE` seconds, and have not said
        that they end.
        """
        now = time.monotonic()
        return sorted(
            number
            for number, (beat, when) in self._heard.items()
            if beat != _ENDED and now - when > SILENCE
        )

    def newly_silent(self) -> list[int]:
        """Return the silent processes that this has not returned before."""
        fresh = [number for number in self.silent() if number not in self._told]
        self._told.update(fresh)
        return fresh

    def wait_for_silent(self, longest: float) -> list[int]:
        """Return the processes that are silent, as soon as one is; none after so many seconds."""
        end = time.monotonic() + longest
        while not (silent := self.silent()) and time.monotonic() < end:
            time.sleep(0.5)
            self.listen()
        return silent

    def _say(self, beat: str) -> None:
        import jax

        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_ALIVE}/{self._index}", beat, allow_overwrite=True)


def find_dead(client: Any, index: int, *, told: str | None) -> list[int]:
    """Return the processes whose death probably made a computation of all fail.

    Args:
        client: the processes' key-value store.
        index: the number of this process.
        told: where another process tells of a failure, if this one leaves it to that.

    """
    import jax

    if told is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.blocking_key_value_get(told, int((SILENCE + _GRACE) * 1000))
        return []
    heartbeats = Heartbeats(client, index)
    heartbeats.listen()
    return heartbeats.wait_for_silent(SILENCE + _GRACE / 2)


def describe_silence(numbers: list[int]) -> str:
    """Return in a line which processes are not heard of, and what that may mean."""
    who = f"process {numbers[0]} has" if len(numbers) == 1 else f"processes {numbers} have"
    return (
        f"{who} not been heard of for {SILENCE:.0f} s. If that lasts, all end in a few seconds: it "
        "was killed, or its machine failed. Start the same command again then; it goes on from the "
        "last checkpoint."
    )


def describe_death(numbers: list[int]) -> str:
    """Return in a line which processes died, and how to go on."""
    who = f"process {numbers[0]} is" if len(numbers) == 1 else f"processes {numbers} are"
    return (
        f"{who} gone (killed, or the machine failed), so the others end. Start the same command "
        "again: it goes on from the last checkpoint."
    )
