"""The run directory: the whole record of a run, which only the same run may continue."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config.keys import flatten, keys_with
from jaxtune.config.load import validated
from jaxtune.config.schema import Config
from jaxtune.config.traits import Trait
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import (
    Replacement,
    check_writable,
    remove_leftovers,
    remove_made,
    write_json,
)
from jaxtune.core.locks import Lock, LockHeldError
from jaxtune.core.text import without_credentials
from jaxtune.tracking.ownership import (
    CONFIG,
    DATA_SUMMARY,
    ENVIRONMENT,
    MARKER,
    OUTPUTS,
    OWN,
    RECORD,
    check_claimed,
    check_inputs,
    check_unclaimed,
    is_earlier_run,
    made_in,
    read_marker,
    read_marker_quietly,
    remove_checkpoints,
    remove_run,
    write_marker,
    write_whole,
)
from jaxtune.tracking.record import (
    COPIED,
    LAYOUT,
    check_layout,
    checkpoint_directory,
    environment,
    environment_of,
    read_config_file,
    recall,
    record_directory,
    record_of,
    write_config,
)

_LOCK = ".lock"


class RunDirectory:
    """A run directory that is open for training, locked against a second process.

    Args:
        config: the resolved configuration; `config.run.dir` is the directory.
        data: a digest of the tokens of each part, and of the weights that the run begins from.
        day: the day the run began.
        fresh: remove what an earlier run left there.
        warn: told what was lost, and where the file system has no locks.

    Attributes:
        id: the run's, which its checkpoints carry.

    Raises:
        UserError: the directory belongs to a run with another configuration, other data or a newer
            layout, holds what no run made, or is in use.

    """

    def __init__(
        self,
        config: Config,
        data: dict[str, str],
        day: date,
        fresh: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.path, self._place = Path(config.run.dir), checkpoint_directory(config)
        self._elsewhere = record_directory(config)
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / _LOCK)
        except OSError as error:
            raise UserError(f"run.dir: cannot create {self.path}: {error.strerror}.") from None
        except LockHeldError as holder:
            raise UserError(
                f"{self.path}: another process is training in this run directory ({holder}). Set "
                "run.dir to another one."
            ) from None
        if not self._lock.is_sure:
            warn(
                f"WARNING: the file system of {self.path} has no locks, so that a second process "
                "which trains there would go unnoticed."
            )
        try:
            check_place(config, fresh)
            self._marker = read_marker(self.path, "run") or {}
            self._clean()
            if fresh:
                self._clear(warn)
            else:
                there = record_of(config)
                self._marker = read_marker_quietly(there) or {}
                self._check(there, config, data, warn)
                recall(config)
            self._claim(config, data, day)
        except BaseException:
            if is_new:
                remove_made(self.path, [_LOCK])
            self.close()
            raise

    @property
    def id(self) -> str:
        """Return the run's id."""
        return self._marker["id"]

    @property
    def has_saved(self) -> bool:
        """Return whether the run has completed a checkpoint."""
        return bool(self._marker.get("saved"))

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def note_saved(self) -> None:
        """Note that a checkpoint is complete: one that is missing later was lost."""
        if not self.has_saved:
            self._note(saved=True)

    def before_checkpoint(self) -> None:
        """Note what the checkpoint about to be written can rely on: those before it, and a copy of
        the record beside it.
        """
        if _has_checkpoints(self._place):
            self.note_saved()
        self.keep_copy()

    def keep_copy(self) -> None:
        """Copy the record to where the checkpoints lie, if that is elsewhere, so that a new machine
        can continue the run.
        """
        if self._elsewhere is None:
            return
        self._elsewhere.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            if (self.path / name).exists():
                text = (self.path / name).read_text(encoding="utf-8")
                write_whole(self._elsewhere / name, without_credentials(text))

    def replacement(self, name: str) -> Replacement:
        """Return the leave to replace an output, `adapter` or `model`, by a new one."""
        own = made_in(self.path, self._marker, name)

        def note(files: list[str]) -> None:
            others = self._marker.get("made", {})
            self._note(made=others | {name: sorted({*own, *files})})

        return Replacement(own, note)

    def _note(self, **values: Any) -> None:
        self._marker = write_marker(self.path, "run", self._marker | values)

    def _clean(self) -> None:
        """Remove what a killed process left under temporary names."""
        for name in OWN:
            remove_leftovers(self.path / name, made_in(self.path, self._marker, name))

    def _clear(self, warn: Callable[[str], None]) -> None:
        """Remove what an earlier run made, and say where something else stays."""
        kept = [str(self.path / name) for name in remove_run(self.path, self._marker)]
        if not remove_checkpoints(self._place):
            kept.append(str(self._place))
        if kept:
            warn(f"{listed(kept)}: what the run did not make stays there.")
        self._marker = write_marker(self.path, "run", {})

    def _claim(self, config: Config, data: dict[str, str], day: date) -> None:
        """Write whose the directory is, then what the run is."""
        outputs = {name: made_in(self.path, self._marker, name) for name in OUTPUTS}
        self._note(
            made=outputs, day=str(day), data=data, config=_public(config),
            saved=self.has_saved or _has_checkpoints(self._place),
        )  # fmt: skip
        write_config(self.path / CONFIG, config)
        write_json(
            self.path / ENVIRONMENT,
            {"layout": LAYOUT, **environment(), "day": str(day), "data": data},
        )
        self._place.mkdir(parents=True, exist_ok=True)
        write_marker(self._place, "checkpoints", {"id": self.id, "run": str(self.path.resolve())})

    def _check(
        self, there: Any, config: Config, data: dict[str, str], warn: Callable[[str], None]
    ) -> None:
        """Check that the run that is there, if any, is this one, and say what of it was lost."""
        before = _settings(there, self._marker)
        for name, is_whole in ((CONFIG, before.is_whole), (DATA_SUMMARY, None)):
            path = there / name
            if is_whole is None:
                is_whole = not self._marker or not path.exists() or _is_json(path)
            if not is_whole:
                warn(f"WARNING: {path} was lost or is damaged; it is written anew.")
        advice = (
            "Set run.dir to another directory, or start over with --fresh, which removes what the "
            f"run made in {self.path}."
        )
        if before.config is not None:
            now, earlier = flatten(_public(config)), flatten(_public(before.config))
            fixed = [key for key in now if key not in keys_with(Trait.RESUMABLE)]
            if differing := [key for key in fixed if now[key] != earlier[key]]:
                changes = listed(
                    f"{key} ({earlier[key]} there, {now[key]} now)" for key in differing
                )
                raise UserError(
                    f"{there} holds a run with another configuration: {changes}. {advice}"
                )
        changed = [name for name in before.data if name in data and before.data[name] != data[name]]
        if changed:
            raise UserError(
                f"{self.path}: the contents of {listed(changed)} changed since this run began. "
                f"{advice}"
            )


class _Settings(NamedTuple):
    """What a run directory says of its run.

    Attributes:
        config: None where there is no run, or where all that would say it was lost.
        data: digests by key.
        is_whole: whether config.yaml can be read, or is not expected.

    """

    config: Config | None
    data: dict[str, str]
    is_whole: bool


def _settings(directory: Any, marker: dict[str, Any]) -> _Settings:
    """Return the settings of the run in a directory, from its marker and, where that lacks them,
    from config.yaml and env.json.
    """
    config, is_whole = None, True
    if marker.get("config") is not None:
        config = validated(marker["config"], origin=str(directory / MARKER))
    try:
        there = read_config_file(directory)
        config = config or there
    except UserError:
        is_whole = not marker and not (directory / CONFIG).exists()
    data = marker.get("data") or environment_of(directory).get("data") or {}
    return _Settings(config, data, is_whole)


def check_place(config: Config, fresh: bool = False) -> None:
    """Check, before anything loads, that a run may write where it would.

    Args:
        config: the run.
        fresh: whether it removes what an earlier run left there.

    Raises:
        UserError: what it reads lies where it writes, something that no run made is in its way, or
            a directory belongs to another run.

    """
    directory, place = Path(config.run.dir), checkpoint_directory(config)
    check_inputs(config, directory, place)
    check_writable(directory / MARKER)
    marker = read_marker(directory, "run")
    if marker is None and not is_earlier_run(directory):
        check_unclaimed(directory, OWN)
    else:
        if not fresh:
            check_layout(directory)
        check_claimed(directory, marker or {})
    _check_checkpoints(config, directory, place, marker)


def _check_checkpoints(
    config: Config, directory: Path, place: Any, marker: dict[str, Any] | None
) -> None:
    """Check that the directory of the checkpoints is empty or this run's."""
    if not place.exists():
        return
    if not place.is_dir():
        raise UserError(f"{place} is a file, and checkpoints need a directory.")
    there = read_marker(place, "checkpoints")
    own = (marker or {}).get("id")
    if there:
        other = Path(str(there.get("run")))
        if own is not None and there["id"] != own:
            raise UserError(
                f"{place} holds the checkpoints of another run ({other}). Set checkpoint.dir to "
                "another directory."
            )
        is_elsewhere = other.resolve() != directory.resolve() and (
            (read_marker_quietly(other) or {}).get("id") == there["id"]
        )
        if config.checkpoint.dir is not None and is_elsewhere:
            copy = "" if own is None else f", of which {directory} is a copy"
            raise UserError(
                f"{place} holds the checkpoints of the run in {other}{copy}. Set checkpoint.dir to "
                f"another directory, or go on there: run.dir={other}."
            )
        return
    is_known = there is not None or (place / RECORD / CONFIG).exists()
    if is_known or config.checkpoint.dir is None or is_earlier_run(directory):
        return
    if names := sorted(entry.name for entry in place.iterdir()):
        raise UserError(
            f"checkpoint.dir: {place} holds {listed(names, 3)}, which no run made there. Set "
            "checkpoint.dir to another directory."
        )


def _has_checkpoints(place: Any) -> bool:
    return place.is_dir() and any(entry.name.isdigit() for entry in place.iterdir())


def _public(config: Config) -> dict[str, Any]:
    """Return a configuration's values without the credentials of its URLs."""
    return json.loads(without_credentials(config.model_dump_json()))


def _is_json(path: Any) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
