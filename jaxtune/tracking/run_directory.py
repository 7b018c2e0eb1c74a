"""The run directory: the whole record of a run, which only the same run may continue."""

import fcntl
import importlib.metadata
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from etils import epath

from jaxtune.config.keys import flatten, keys_with
from jaxtune.config.load import dump, load_config
from jaxtune.config.schema import Config
from jaxtune.config.traits import Trait
from jaxtune.core.errors import UserError, first_line, listed
from jaxtune.core.files import read_json, write_json, write_text
from jaxtune.core.text import without_credentials
from jaxtune.tracking.metrics_log import FILE as METRICS
from jaxtune.tracking.trackers import TRACKED

LAYOUT = 1
"""The version of what a run directory holds. Before 1 it was not noted, and rows of evaluations had
no `phase`; such runs are continued, exported and reported as layout 0.
"""
CONFIG, ENVIRONMENT, REPORT = "config.yaml", "env.json", "report.html"
SAMPLES, PREDICTIONS = "samples.jsonl", "predictions.jsonl"
DATA_SUMMARY, VERIFICATION = "data.json", "verification.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
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
        UserError: the directory belongs to a run with another configuration, other data or a newer
            layout, or is in use.

    """

    def __init__(
        self, config: Config, data: dict[str, str], day: date, fresh: bool = False
    ) -> None:
        self.path, self._elsewhere = Path(config.run.dir), _record(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"run.dir: cannot create {self.path}: {error.strerror}.") from None
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
            text = dump(config)
            # A run goes on from this file: it keeps the credentials of its URLs, for its owner.
            is_secret = without_credentials(text) != text
            write_text(self.path / CONFIG, text, 0o600 if is_secret else 0o644)
            write_json(
                self.path / ENVIRONMENT,
                {"layout": LAYOUT, **environment(), "day": str(day), "data": data},
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()
        (self.path / ".lock").unlink(missing_ok=True)

    def keep_copy(self) -> None:
        """Copy the record to where the checkpoints lie, if that is elsewhere, so that a new machine
        can continue the run.
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
        now = flatten(config.model_dump(mode="json"))
        there = flatten(read_config(self.path).model_dump(mode="json"))
        fixed = [key for key in now if key not in keys_with(Trait.RESUMABLE)]
        differing = [key for key in fixed if now[key] != there[key]]
        advice = (
            "Set run.dir to another directory, or start over with --fresh, which removes what "
            f"{self.path} holds."
        )
        if differing:
            changes = listed(
                without_credentials(f"{key} ({there[key]} there, {now[key]} now)")
                for key in differing
            )
            raise UserError(
                f"{self.path} holds a run with another configuration: {changes}. {advice}"
            )
        before = _read_environment(self.path).get("data", {})
        if changed := [name for name in before if name in data and before[name] != data[name]]:
            raise UserError(
                f"{self.path}: the contents of {listed(changed)} changed since this run began. "
                f"{advice}"
            )


def _record(config: Config) -> Any:
    """Return where the record is copied to, beside checkpoints that lie elsewhere; None where they
    lie in the run directory.
    """
    return checkpoint_directory(config) / "record" if config.checkpoint.dir else None


def recall(config: Config) -> None:
    """Bring back the record of a run whose directory is gone, from beside its checkpoints."""
    directory, elsewhere = Path(config.run.dir), _record(config)
    if elsewhere is None or (directory / CONFIG).exists() or not elsewhere.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name in sorted(_RECORD, key=lambda name: name == CONFIG):  # last: it vouches for the rest
        if (elsewhere / name).exists():
            (directory / name).write_bytes((elsewhere / name).read_bytes())


def checkpoint_directory(config: Config) -> Any:
    """Return the directory of a run's checkpoints.

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
            "gs:// install gcsfs, for s3:// s3fs, and log in there."
        ) from None
    return path


def read_config(directory: Path) -> Config:
    """Return the configuration of a run directory.

    Raises:
        UserError: there is none, or it is not one of this version.

    """
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{directory} is not a run directory: it has no {CONFIG}.")
    check_layout(directory)
    return load_config(path)


def check_layout(directory: Path) -> None:
    """Check that this version knows what a run directory holds.

    Raises:
        UserError: a newer version wrote it.

    """
    environment = _read_environment(directory)
    layout, versions = environment.get("layout", 0), environment.get("versions")
    if isinstance(layout, int) and layout > LAYOUT:
        writer = versions.get("jaxtune") if isinstance(versions, dict) else None
        raise UserError(
            f"{directory} was written by jaxtune {writer} with layout {layout}; this is jaxtune "
            f"{_version('jaxtune')}, which knows layouts up to {LAYOUT}. Upgrade jaxtune."
        )


def is_run(path: str | Path) -> bool:
    """Return whether `path` is a run directory."""
    return (Path(path) / CONFIG).is_file()


def first_day(path: str | Path) -> date:
    """Return the day a run began; today where it has not. Chat templates may print it, and a run
    that is continued must see the same tokens.
    """
    try:
        return date.fromisoformat(_read_environment(Path(path))["day"])
    except (UserError, KeyError, ValueError):
        return date.today()


def environment() -> dict[str, Any]:
    """Return versions, devices and the working directory's git commit."""
    import jax

    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if shutil.which("git")
        else None
    )
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git_commit": git.stdout.strip() or None if git else None,
    }


def _read_environment(directory: Path) -> dict[str, Any]:
    path = directory / ENVIRONMENT
    value = read_json(path) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
