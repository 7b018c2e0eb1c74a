"""A profile of some steps, for XProf or Perfetto."""

from pathlib import Path

import jax

from jaxtune.core.distributed import is_main

FOLDER = "profile"
_AFTER = 2  # steps of this call that are not recorded: they compile, and fill the queue


class Profile:
    """A recording, in `profile/` of the run, of what devices and host do in some steps.

    Args:
        directory: the run directory.
        steps: how many steps, after the first ones of a call; 0 records nothing.

    """

    def __init__(self, directory: str, steps: int) -> None:
        self.path, self.steps = Path(directory) / FOLDER, steps if is_main() else 0
        self._seen, self._recording = 0, False

    def before(self) -> None:
        """Start to record, if the step about to be dispatched is the first to be recorded."""
        if self.steps and self._seen == _AFTER:
            jax.profiler.start_trace(str(self.path), create_perfetto_trace=True)
            self._recording = True
        self._seen += 1

    def after(self, result: object) -> None:
        """Stop recording, if the step just dispatched, which gives `result`, is the last one."""
        if self._recording and self._seen == _AFTER + self.steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
