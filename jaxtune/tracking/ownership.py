"""Whose a directory is: `run.json`, written there before anything else, says what made it.

What a run replaces or removes is what it made, in directories that are marked so. Anything else
that is in its way is an error before anything loads.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from etils import epath

from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import files_below, remove_made
from jaxtune.tracking.metrics_log import FILE as METRICS
from jaxtune.tracking.metrics_log import SUPERSEDED
from jaxtune.tracking.trackers import TRACKER_FILES, TRACKER_FOLDERS

MARKER = "run.json"
CONFIG, ENVIRONMENT = "config.yaml", "env.json"
SAMPLES, PREDICTIONS, REPORT = "samples.jsonl", "predictions.jsonl", "report.html"
DATA_SUMMARY, VERIFICATION = "data.json", "verification.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
PROFILE, RECORD = "profile", "record"
OUTPUTS = (ADAPTER, MODEL)
FILES = (
    CONFIG, ENVIRONMENT, METRICS, SUPERSEDED, SAMPLES, PREDICTIONS, DATA_SUMMARY, VERIFICATION,
    REPORT, *TRACKER_FILES,
)  # fmt: skip
FOLDERS = {PROFILE: ("plugins",)} | TRACKER_FOLDERS
"""The folders of a run besides its outputs and checkpoints, with patterns of what each holds."""
OWN = (*FILES, *OUTPUTS, *FOLDERS, CHECKPOINTS)
"""All that a run may make in its directory."""
_OF_CHECKPOINTS = ("best", "sizes", "bad", "values", RECORD, MARKER, f".{MARKER}.tmp")
_ORBAX_STAGING = ".orbax-checkpoint-tmp"

Kind = Literal["run", "checkpoints", "search"]


def read_marker(directory: Any, kind: Kind) -> dict[str, Any] | None:
    """Return what the marker of a directory says; None where there is none, {} where it is damaged.

    Raises:
        UserError: there is a file of its name that jaxtune did not write, or that marks a directory
            of another kind.

    """
    path = directory / MARKER
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict) or not isinstance(values.get("id"), str):
        raise UserError(f"{path} is not a file of jaxtune. Choose another directory.")
    if values.get("jaxtune") != kind:
        raise UserError(
            f"{directory} belongs to a {values.get('jaxtune')}, and is wanted for a {kind}. Choose "
            "another directory."
        )
    return values


def read_marker_quietly(directory: Any) -> dict[str, Any] | None:
    """Return what the marker of a run's directory says; None where that is none."""
    try:
        return read_marker(directory, "run")
    except UserError:
        return None


def write_marker(directory: Any, kind: Kind, values: dict[str, Any]) -> dict[str, Any]:
    """Write the marker of a directory, with a new id where `values` has none; return what it says
    now.
    """
    values = {"jaxtune": kind, "id": secrets.token_hex(16)} | values
    write_whole(directory / MARKER, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return values


def write_whole(path: Any, text: str) -> None:
    """Write a small file, on disk or in an object store, whole or not at all."""
    staging = path.parent / f".{path.name}.tmp"
    staging.write_text(text)
    staging.replace(path)


def is_earlier_run(directory: Path) -> bool:
    """Return whether a directory without a marker is a run's of a version that wrote none."""
    try:
        environment = json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8"))
        return "jaxtune" in environment["versions"] and (directory / CONFIG).is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def made_in(directory: Path, marker: dict[str, Any], name: str) -> list[str]:
    """Return the files of an output (`adapter`, `model`) that the run made, by their paths in it.

    Of a run of a version that did not note them, all that are there where it has finished.
    """
    noted = marker.get("made")
    if isinstance(noted, dict):
        return [str(file) for file in noted.get(name, [])]
    return files_below(directory / name) if (directory / VERIFICATION).is_file() else []


def check_unclaimed(directory: Path, names: Iterable[str]) -> None:
    """Check that nothing in a directory without a marker has the name of what a run makes.

    Raises:
        UserError: something has.

    """
    if in_the_way := [name for name in (MARKER, *names) if os.path.lexists(directory / name)]:
        raise UserError(
            f"{directory} is not a run's directory, and holds {listed(in_the_way)}, which a run "
            "would overwrite. Set run.dir to another directory."
        )


def check_claimed(directory: Path, marker: dict[str, Any]) -> None:
    """Check that what a run would replace in its own directory is what it made.

    Raises:
        UserError: an output holds other files, or a name is taken by something else.

    """
    for name in OUTPUTS:
        path = directory / name
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise UserError(f"{path} is not the folder that the run made. Move it away.")
        others = sorted(set(files_below(path)) - set(made_in(directory, marker, name)))
        if others:
            raise UserError(
                f"{path} holds {listed(others, 3)}, which the run did not make and would remove. "
                "Move it away."
            )
    for name in FILES:
        if (directory / name).is_dir():
            raise UserError(
                f"{directory / name} is a folder where the run writes a file. Move it away."
            )


def check_inputs(config: Config, directory: Path, checkpoints: Any) -> None:
    """Check that a run reads nothing that lies where it writes.

    Args:
        config: the run.
        directory: its directory.
        checkpoints: the directory of its checkpoints.

    Raises:
        UserError: the model, the data, the adapter to start from or the teacher does, or the run
            would write into its own data.

    """
    root = directory.expanduser().resolve()
    written = [root / name for name in (MARKER, *OWN)]
    written += [Path(checkpoints).resolve()] if "://" not in str(checkpoints) else []
    for key, place in _inputs(config):
        path = Path(place).expanduser()
        if "://" in place or not path.exists():
            continue
        path = path.resolve()
        if hit := next((other for other in written if other in (path, *path.parents)), None):
            raise UserError(
                f"{key} = {place} lies where the run writes ({hit}). Set run.dir to another "
                "directory."
            )
        if path.is_dir() and key.startswith("data.") and path in (root, *root.parents):
            raise UserError(
                f"run.dir = {directory} lies in the data's folder ({key} = {place}), so that what "
                "the run writes would be read as data. Set run.dir to another directory."
            )
        if path == root:
            raise UserError(
                f"{key} = {place} is the run's own directory. Set run.dir to another one."
            )


def _inputs(config: Config) -> list[tuple[str, str]]:
    """Return the keys that name what a run reads, with their values."""
    singles = [
        ("model.source", config.model.source),
        ("adapter.init", config.adapter.start),
        ("distill.teacher", config.distill.teacher),
    ]
    data = [
        (f"data.{part}", entry.source)
        for part in ("train", "eval")
        for entry in config.data.entries(part)
    ]
    return [(key, str(value)) for key, value in (*singles, *data) if value]


def remove_run(directory: Path, marker: dict[str, Any]) -> list[str]:
    """Remove what a run made in its directory, its checkpoints aside; the marker stays.

    Returns:
        The folders in which something else is left.

    """
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    kept = [
        name
        for name in OUTPUTS
        if (directory / name).is_dir()
        and not remove_made(directory / name, made_in(directory, marker, name))
    ]
    for name, patterns in FOLDERS.items():
        if not _remove_matching(
            directory / name, lambda entry, p=patterns: any(fnmatch(entry, each) for each in p)
        ):
            kept.append(name)
    return kept


def remove_checkpoints(place: Any) -> bool:
    """Remove what a run made in the directory of its checkpoints, and the directory if nothing is
    left of it; return whether it is gone.
    """
    return _remove_matching(place, is_of_checkpoints)


def _remove_matching(place: Any, is_own: Callable[[str], bool]) -> bool:
    """Remove the entries of a folder whose names are the run's; return whether nothing is left."""
    folder = epath.Path(place)
    if not folder.is_dir():
        return True
    entries = list(folder.iterdir())
    own = [entry for entry in entries if is_own(entry.name)]
    for entry in own:
        if entry.is_dir() and not os.path.islink(entry):
            entry.rmtree()
        else:
            entry.unlink()
    if len(own) < len(entries):
        return False
    if not os.path.islink(folder):  # a link to where there is room is the user's
        folder.rmdir()
    return True


def is_of_checkpoints(name: str) -> bool:
    """Return whether a run gives a name to something in the directory of its checkpoints."""
    return name.isdigit() or name in _OF_CHECKPOINTS or _ORBAX_STAGING in name
