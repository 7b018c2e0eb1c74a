"""A profile of some steps, to be looked at with XProf or Perfetto."""

from pathlib import Path

import jax

from jaxtune.core.distributed import is_main

FOLDER = "profile"
_AFTER = 2  # steps of this call that are not recorded: they compile, and fill the queue


class Profile:
    """Records `steps` steps after the first of a call; what the devices and the host did lies in
    `profile/` of the run.

    Args:
        directory: of the run.
        steps: how many; 0 records nothing.

    """

    def __init__(self, directory: str, steps: int) -> None:
        self.path, self.steps = Path(directory) / FOLDER, steps if is_main() else 0
        self._seen, self._recording = 0, False

    def before(self) -> None:
        """A step is about to be dispatched."""
        if self.steps and self._seen == _AFTER:
            jax.profiler.start_trace(str(self.path), create_perfetto_trace=True)
            self._recording = True
        self._seen += 1

    def after(self, result: object) -> None:
        """A step was dispatched, and this is what it will give."""
        if self._recording and self._seen == _AFTER + self.steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
