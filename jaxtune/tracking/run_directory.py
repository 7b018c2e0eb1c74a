"""The run directory: the whole record of a run, and the guard that it is continued by the same
run only.
"""

import fcntl
import importlib.metadata
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from jaxtune.config.keys import flatten, keys_with
from jaxtune.config.load import dump, validated
from jaxtune.config.schema import Config
from jaxtune.config.traits import Trait
from jaxtune.core.errors import UserError, first_line, listed
from jaxtune.core.files import read_json, write_json, write_text
from jaxtune.tracking.metrics_log import FILE as METRICS
from jaxtune.tracking.trackers import TRACKED

CONFIG, ENVIRONMENT, SAMPLES, ADAPTER, REPORT = (
    "config.yaml",
    "env.json",
    "samples.jsonl",
    "adapter",
    "report.html",
)
MODEL = "model"
CHECKPOINTS = "checkpoints"
DATA_SUMMARY, VERIFICATION, PREDICTIONS = "data.json", "verification.json", "predictions.jsonl"
_RECORD = (CONFIG, ENVIRONMENT, METRICS, SAMPLES)
_OWN = (
    CONFIG, ENVIRONMENT, SAMPLES, ADAPTER, MODEL, REPORT, DATA_SUMMARY, VERIFICATION, PREDICTIONS,
    METRICS, CHECKPOINTS, *TRACKED,
)  # fmt: skip

_PACKAGES = (
    "jaxtune",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "numpy",
)


class RunDirectory:
    """A run directory that is open for training, locked against a second process.

    Args:
        config: the resolved configuration; `config.run.dir` is the directory.
        data: a digest of the tokens of each part.
        day: the day the run began.
        fresh: remove what an earlier run left there.

    Raises:
        UserError: the directory belongs to a run with another configuration or other data, or is in
            use.

    """

    def __init__(
        self, config: Config, data: dict[str, str], day: date, fresh: bool = False
    ) -> None:
        self.path, self._elsewhere = Path(config.run.dir), _record(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"run.dir: {self.path} cannot be made: {error.strerror}.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.path}: another process is training in this run directory. Set run.dir to "
                "another one."
            ) from None
        try:
            if fresh:
                self._clear(config)
            recall(config)
            self._check(config, data)
            write_text(self.path / CONFIG, dump(config))
            write_json(self.path / ENVIRONMENT, {**environment(), "day": str(day), "data": data})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()
        (self.path / ".lock").unlink(missing_ok=True)

    def keep_copy(self) -> None:
        """Copy what tells of the run to where its checkpoints lie, if that is elsewhere, so that
        a new machine can go on.
        """
        if self._elsewhere is None:
            return
        self._elsewhere.mkdir(parents=True, exist_ok=True)
        for name in _RECORD:
            if (self.path / name).exists():
                (self._elsewhere / name).write_bytes((self.path / name).read_bytes())

    def _clear(self, config: Config) -> None:
        elsewhere = checkpoint_directory(config)
        if elsewhere.exists():
            elsewhere.rmtree()
        for name in _OWN:
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _check(self, config: Config, data: dict[str, str]) -> None:
        if not (self.path / CONFIG).exists():
            return
        ours = flatten(config.model_dump(mode="json"))
        theirs = flatten(read_config(self.path).model_dump(mode="json"))
        fixed = [key for key in ours if key not in keys_with(Trait.RESUMABLE)]
        differing = [key for key in fixed if ours[key] != theirs[key]]
        advice = f"Set run.dir to another directory, or start over with --fresh, which removes what {self.path} holds."
        if differing:
            changes = listed(f"{key} ({theirs[key]} there, {ours[key]} now)" for key in differing)
            raise UserError(
                f"{self.path} holds a run with another configuration: {changes}. {advice}"
            )
        before = (
            read_json(self.path / ENVIRONMENT).get("data", {})
            if (self.path / ENVIRONMENT).exists()
            else {}
        )
        if changed := [name for name in before if name in data and before[name] != data[name]]:
            raise UserError(
                f"{self.path}: the contents of {listed(changed)} changed since this run began. "
                f"{advice}"
            )


def _record(config: Config) -> Any:
    """Where the record is copied to, beside checkpoints that lie elsewhere; None where they lie
    in the run directory.
    """
    return checkpoint_directory(config) / "record" if config.checkpoint.dir else None


def recall(config: Config) -> None:
    """Bring back the record of a run whose directory is gone, from beside its checkpoints."""
    directory, elsewhere = Path(config.run.dir), _record(config)
    if elsewhere is None or (directory / CONFIG).exists() or not elsewhere.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name in sorted(
        _RECORD, key=lambda name: name == CONFIG
    ):  # last what says that the rest is there
        if (elsewhere / name).exists():
            (directory / name).write_bytes((elsewhere / name).read_bytes())


def checkpoint_directory(config: Config) -> Any:
    """Where a run's checkpoints lie.

    Raises:
        UserError: in an object store whose library is not installed.

    """
    if config.checkpoint.dir is None:
        return epath.Path(Path(config.run.dir).resolve() / CHECKPOINTS)
    if "://" not in config.checkpoint.dir:
        return epath.Path(Path(config.checkpoint.dir).expanduser().resolve())
    try:
        path = epath.Path(config.checkpoint.dir)
        path.exists()
    except (ImportError, KeyError, OSError) as error:
        raise UserError(
            f"checkpoint.dir: {config.checkpoint.dir} cannot be reached: {first_line(error)}. For "
            "gs:// install gcsfs, for s3:// s3fs, and "
            "log in there."
        ) from None
    return path


def read_config(directory: Path) -> Config:
    """The configuration of a run directory.

    Raises:
        UserError: there is none, or it is not one of this version.

    """
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{directory} is not a run directory: it has no {CONFIG}.")
    return validated(yaml.safe_load(path.read_text(encoding="utf-8")), origin=str(path))


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run directory."""
    return (Path(path) / CONFIG).is_file()


def first_day(path: str | Path) -> date:
    """The day a run began; today where it has not. Chat templates may print it, and a run that
    goes on must see the same tokens.
    """
    try:
        return date.fromisoformat(read_json(Path(path) / ENVIRONMENT)["day"])
    except (UserError, KeyError, ValueError):
        return date.today()


def environment() -> dict[str, Any]:
    """Versions, devices and the working directory's git commit."""
    import jax

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if shutil.which("git")
        else None
    )
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git_commit": git.stdout.strip() or None if git else None,
    }
