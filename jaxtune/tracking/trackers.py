"""Trackers, which receive the rows of `metrics.jsonl`; one that fails is closed, and the run
continues.
"""

import contextlib
import importlib
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.core.text import without_credentials

_PROJECT = "jaxtune"
_TENSORBOARD, _IDENTITY = "tensorboard", "wandb-id"
TRACKER_FILES = (_IDENTITY,)
TRACKER_FOLDERS = {
    _TENSORBOARD: ("events.out.tfevents.*",),
    "wandb": ("run-*", "offline-run-*", "latest-run", "debug*.log", "settings"),
}
"""What trackers leave in a run directory; of folders, patterns of what they hold."""


class Tracker(Protocol):
    """A service or file that receives numbers by name at a step."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Receive the metrics of one row."""

    def close(self) -> None:
        """Finish: nothing more comes."""


class Trackers:
    """All trackers of a run.

    Args:
        config: the run.
        warn: told once of each tracker that fails.
        step: the step that the run goes on from; what a tracker has of later ones is done again.

    Raises:
        UserError: a tracker that is not installed.

    """

    def __init__(self, config: Config, warn: Callable[[str], None], step: int = 0) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in config.run.trackers:
            self._try(
                name, lambda name=name: self._open.update({name: _TRACKERS[name](config, step)})
            )

    def write(self, row: dict[str, Any]) -> None:
        """Pass on the numbers of a row, named after its split, such as train/loss."""
        numbers = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        step = int(numbers.pop("step"))
        metrics = {f"{row['split']}/{name}": float(value) for name, value in numbers.items()}
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(metrics, step))

    def close(self) -> None:
        """Close all trackers."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                action()
        except UserError:
            raise
        except Exception as error:  # a network that is gone must not cost a run
            self._open.pop(name, None)
            self._warn(
                f"{name} takes no more metrics: {type(error).__name__}: {error}. The run and its "
                "metrics.jsonl go on."
            )


def check_trackers(config: Config) -> None:
    """Check that all trackers are installed, before anything long is done.

    Raises:
        UserError: one is not.

    """
    for name in config.run.trackers:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module("tensorboard.summary" if name == "tensorboard" else name)
    except ModuleNotFoundError:
        raise UserError(
            f"run.trackers: {name} is not installed: pip install 'jaxtune[track]', or take it out "
            "of run.trackers."
        ) from None


class _TensorBoard:
    """TensorBoard's event files; a run that goes on says so, and TensorBoard then drops what an
    earlier file has of the steps that are done again.
    """

    def __init__(self, config: Config, step: int) -> None:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        folder = Path(config.run.dir) / _TENSORBOARD
        _mark_restart(str(folder), step + 1)
        self._writer = _module("tensorboard").Writer(str(folder))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _mark_restart(folder: str, step: int) -> None:
    """Write that what comes begins at a step. TensorBoard takes the first such mark for the
    beginning, and files of earlier versions have none: so it is written twice.
    """
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    messages: Any = event_pb2  # generated: a type checker sees none of its names
    writer = EventFileWriter(folder)
    start = messages.SessionLog(status=messages.SessionLog.START)
    for _ in range(2):
        writer.add_event(messages.Event(wall_time=time.time(), step=step, session_log=start))
    writer.close()


class _WandB:
    """A Weights & Biases run; a run that is continued is the same run there."""

    def __init__(self, config: Config, step: int) -> None:
        wandb = _module("wandb")
        identity = Path(config.run.dir) / _IDENTITY
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT), name=Path(config.run.dir).name,
            id=identity.read_text(), resume="allow",
            dir=config.run.dir, config=_public(config),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics | {"step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, config: Config, step: int) -> None:
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._run = _module("trackio").init(
            project=project,
            name=Path(config.run.dir).name,
            config=_public(config),
            resume="allow",
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Config, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


def _public(config: Config) -> dict[str, Any]:
    """Return a configuration without the credentials of its URLs."""
    return json.loads(without_credentials(config.model_dump_json()))
