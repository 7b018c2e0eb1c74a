"""What a run directory says of its run, wherever it lies now."""

import contextlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from etils import epath

from jaxtune.config.load import dump, load_config, validated, with_keys
from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError, first_line
from jaxtune.core.files import write_text
from jaxtune.core.text import without_credentials
from jaxtune.tracking.metrics_log import FILE as METRICS
from jaxtune.tracking.ownership import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    MARKER,
    RECORD,
    SAMPLES,
    read_marker_quietly,
)

LAYOUT = 1
"""The version of what a run directory holds. Before 1 it was not noted, and rows of evaluations had
no `phase`; such runs are continued, exported and reported as layout 0.
"""
COPIED = (CONFIG, ENVIRONMENT, METRICS, SAMPLES, MARKER)
"""What is copied to where the checkpoints lie, if that is elsewhere."""

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
    """Return the configuration of a run directory, which may have been moved or copied: its
    `run.dir` is where it lies now.

    Raises:
        UserError: there is none, or it is not one of this version.

    """
    if not is_run(directory):
        raise UserError(f"{directory} is not a run directory: it has no {CONFIG}.")
    check_layout(directory)
    marker = read_marker_quietly(directory) or {}
    try:
        config = read_config_file(directory)
    except UserError:
        if marker.get("config") is None:
            raise
        config = validated(marker["config"], origin=str(directory / MARKER))
    return placed(config, directory)


def placed(config: Config, directory: Path) -> Config:
    """Return a run's configuration with the directory that it lies in now."""
    if Path(config.run.dir).resolve() == directory.resolve():
        return config
    return with_keys(config, {"run.dir": str(directory)})


def load_run(path: Path | None, overrides: list[str] | None = None) -> Config:
    """Return the configuration of a YAML file and overrides, as `config.load.load_config` does; a
    config.yaml of a run directory that was moved or copied means the run where it lies now.

    Raises:
        UserError: as `load_config`.

    """
    overrides = overrides or []
    config = load_config(path, overrides)
    if path is None or path.name != CONFIG or any(o.startswith("run.dir=") for o in overrides):
        return config
    marker = read_marker_quietly(path.parent) or {}
    noted = marker.get("config") or {}
    is_untouched = noted.get("run", {}).get("dir") == config.run.dir
    return placed(config, path.parent) if is_untouched else config


def write_config(path: Path, config: Config) -> None:
    """Write a configuration; one whose URLs hold credentials is its owner's alone. They stay, since
    a run goes on from this file.
    """
    text = dump(config)
    write_text(path, text, 0o600 if without_credentials(text) != text else None)


def read_config_file(directory: Any) -> Config:
    """Return what config.yaml of a run directory says, as it says it.

    Raises:
        UserError: it is not there, is damaged, or is no configuration.

    """
    path = directory / CONFIG
    config = load_config(path)
    if not path.read_text(encoding="utf-8").strip():
        raise UserError(f"{path} is damaged: it is empty.")
    return config


def check_layout(directory: Any) -> None:
    """Check that this version knows what a run directory holds.

    Raises:
        UserError: a newer version wrote it.

    """
    environment = environment_of(directory)
    layout = environment.get("layout", 0)
    if isinstance(layout, int) and layout > LAYOUT:
        versions = environment.get("versions")
        writer = versions.get("jaxtune") if isinstance(versions, dict) else None
        raise UserError(
            f"{directory} was written by jaxtune {writer} with layout {layout}; this is jaxtune "
            f"{_version('jaxtune')}, which knows layouts up to {LAYOUT}. Upgrade jaxtune."
        )


def is_run(path: Any) -> bool:
    """Return whether `path` is a run directory."""
    directory = epath.Path(path)
    return (directory / CONFIG).is_file() or bool(read_marker_quietly(directory))


def first_day(path: Any) -> date:
    """Return the day a run began; today where it has not. Chat templates may print it, and a run
    that is continued must see the same tokens.
    """
    directory = epath.Path(path)
    marker = read_marker_quietly(directory) or {}
    try:
        return date.fromisoformat(marker.get("day") or environment_of(directory)["day"])
    except (KeyError, TypeError, ValueError):
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


def environment_of(directory: Any) -> dict[str, Any]:
    """Return what env.json says, {} where it is gone or damaged."""
    try:
        values = json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record_directory(config: Config) -> Any:
    """Return where the record is copied to, beside checkpoints that lie elsewhere; None where they
    lie in the run directory.
    """
    return checkpoint_directory(config) / RECORD if config.checkpoint.dir else None


def record_of(config: Config) -> Any:
    """Return where the run's record lies: its directory, or, where that is gone, beside its
    checkpoints.
    """
    directory, elsewhere = Path(config.run.dir), record_directory(config)
    is_gone = elsewhere is not None and not is_run(directory) and elsewhere.exists()
    return elsewhere if is_gone else directory


def recall(config: Config) -> None:
    """Bring back the record of a run whose directory is gone, from beside its checkpoints."""
    directory, elsewhere = Path(config.run.dir), record_directory(config)
    if elsewhere is None or is_run(directory) or not elsewhere.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    # The two that make it a run come last.
    for name in sorted(COPIED, key=lambda name: name in (CONFIG, MARKER)):
        if not (elsewhere / name).exists():
            continue
        with contextlib.suppress(UnicodeDecodeError):  # damaged; other damage shows when it is read
            write_text(directory / name, (elsewhere / name).read_text())
