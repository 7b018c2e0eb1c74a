"""Files and folders that are complete or absent: written under a temporary name, then renamed."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.core.locks import held

_NEW, _OLD = "jaxtune-new-", "jaxtune-old-"
"""What a temporary name has after the name it stands for."""

_MODEL_SUFFIXES = (
    ".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin", ".pth", ".gguf",
)  # fmt: skip


def shown(path: str | Path) -> str:
    """Return a path as a person would type it: relative to the working directory, if inside it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Replace the file at `path` by `text`; readers see the old text or the new, never a part.

    Args:
        path: the file.
        text: what it holds then.
        mode: its permissions; by default as the umask says.

    """
    with _staged(path) as staging:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
        _make_durable(staging)
        if mode is not None:
            staging.chmod(mode)
        os.replace(staging, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write `rows` as JSON Lines, completely or not at all."""
    write_text(path, jsonl_text(rows))


def jsonl_text(rows: list[dict]) -> str:
    """Return `rows` as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    """Return the rows that `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`.

    Raises:
        UserError: the file is missing, or is not JSON; with the line.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON: {error}. Write or download the file again."
        ) from None


def check_inside(directory: Path, file: Path) -> Path:
    """Return a file of a directory that others may have filled, if it may be read.

    The hub's cache, whose files are links into the folder of blobs beside its snapshots, is inside.

    Raises:
        UserError: its links lead out of the directory, or it is a pipe, a socket or a device.

    """
    home = directory.resolve()
    try:
        real = file.resolve()
    except (OSError, RuntimeError):
        raise UserError(f"{file} is a link that leads nowhere. Remove it.") from None
    models = (path.parent for path in (home, *home.parents) if path.name == "snapshots")
    roots = [home, *(model / "blobs" for model in models if "--" in model.name)]
    if not any(real.is_relative_to(root) for root in roots):
        raise UserError(
            f"{file} is a link that leads out of the directory, to {real}. If you trust it, put a "
            "copy in its place."
        )
    if real.exists() and not real.is_file() and not real.is_dir():
        raise UserError(f"{file} is a pipe, a socket or a device, not a file. Remove it.")
    return file


def check_directory(directory: Path) -> None:
    """Check the files of a model's or an adapter's directory as `check_inside` does, before any is
    read or copied.

    Raises:
        UserError: as `check_inside`.

    """
    if not directory.is_dir():
        if directory.exists() and not directory.is_file():
            raise UserError(f"{directory} is a pipe, a socket or a device, not a file.")
        return
    for entry in sorted(directory.iterdir()):
        if entry.suffix in _MODEL_SUFFIXES:
            check_inside(directory, entry)
    for entry in sorted(directory.glob("additional_chat_templates/*")):
        check_inside(directory, entry)


def default_cache_root() -> Path:
    """Return the user's cache folder: `$XDG_CACHE_HOME/jaxtune`, or `~/.cache/jaxtune`; a user
    without a home, as in many containers, has one of his own below the temporary folder.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "jaxtune"
    try:
        return Path.home() / ".cache" / "jaxtune"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"jaxtune-{os.getuid()}"


def cache_root() -> Path:
    """Return where plans and tokenized data are cached: `JAXTUNE_CACHE`, or the default folder."""
    return Path(os.environ.get("JAXTUNE_CACHE") or default_cache_root())


def check_writable(target: Path) -> None:
    """Check, before anything long is done, that a file or directory can be made at `target`.

    Raises:
        UserError: one of the folders it would lie in is a file, or may not be written to.

    """
    folder = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise UserError(f"{target} cannot be made: {folder} is no folder. Choose another place.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{target} cannot be made: {folder} may not be written to. Choose another place, or "
            "change its permissions."
        )


def refuse_existing(target: Path) -> None:
    """Refuse to overwrite what is at `target`.

    Raises:
        UserError: `target` is a file or a link, or a directory that holds something.

    """
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} already exists and is not empty. Choose another name or remove it."
        )


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write; the file takes the name `target` if the block succeeds.

    Raises:
        UserError: `target` exists.

    """
    refuse_existing(target)
    with _staged(target, is_folder=True) as staging:
        path = staging / target.name
        yield path
        _make_durable(path)
        refuse_existing(target)
        os.replace(path, target)


@dataclass(frozen=True)
class Replacement:
    """The leave to replace a directory that an earlier call made.

    Attributes:
        own: the files that were made there, by their paths in it; no other is removed.
        note: called with the files of the new directory before it takes its name.

    """

    own: Collection[str]
    note: Callable[[list[str]], None]


@contextmanager
def new_directory(target: Path, *, replace: Replacement | None = None) -> Iterator[Path]:
    """Give a directory beside `target` to fill; it takes the name `target` if the block succeeds.

    An earlier `target` that is replaced is renamed first and removed last; where it holds what was
    not made there, that stays in a folder beside it, `NAME-kept-1`.

    Args:
        target: the directory to make.
        replace: whether and how an existing `target` is replaced.

    Raises:
        UserError: `target` exists and is not empty, and `replace` is None.

    """
    if replace is None:
        refuse_existing(target)
    with _staged(target, is_folder=True) as staging:
        yield staging
        _make_durable(staging)
        if replace is None:
            refuse_existing(target)
            os.replace(staging, target)
            return
        replace.note(files_below(staging))
        old = _temporary(target, _OLD)
        if target.exists():
            target.rename(old)
        os.replace(staging, target)
        if old.exists() and not remove_made(old, replace.own):
            old.rename(_free_name(target))


def files_below(folder: Path) -> list[str]:
    """Return the paths, in `folder`, of all files and links below it, in order."""
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, folders, files in os.walk(folder)
        for name in [*files, *(name for name in folders if Path(parent, name).is_symlink())]
    )


def remove_made(folder: Path, own: Collection[str]) -> bool:
    """Remove these files of a folder, the folders that become empty, and the folder if nothing is
    left of it.

    Returns:
        Whether nothing is left.

    """
    for name in own:
        path = folder / name
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == folder:
                break
            _remove_if_empty(parent)
    return _remove_if_empty(folder)


def remove_leftovers(target: Path, own: Collection[str] = ()) -> None:
    """Remove what a killed process left of a new `target`; an old one that it had renamed comes
    back if there is no new one.

    Args:
        target: a file or directory that is written under a temporary name.
        own: the files of an old one, which go where there is a new one.

    """
    if not target.parent.is_dir():
        return
    for mark in (_OLD, _NEW):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{mark}*"):
            with held(path) as is_free:
                if not is_free:
                    continue
                if mark == _OLD and not os.path.lexists(target):
                    path.rename(target)
                elif mark == _OLD:
                    if not remove_made(path, own):
                        path.rename(_free_name(target))
                elif path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


@contextmanager
def _staged(target: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """Give a new file or folder beside `target`, held until the block ends; what is still there
    then is removed, and so are the parents of `target` that were made for nothing.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_folder:
        remove_leftovers(target)
    path = _temporary(target, _NEW)
    try:
        path.mkdir() if is_folder else path.touch(exist_ok=False)
        with held(path):
            yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        for folder in missing:
            _remove_if_empty(folder)


def _temporary(target: Path, mark: str) -> Path:
    return target.parent / f".{target.name}.{mark}{secrets.token_hex(4)}"


def _free_name(target: Path) -> Path:
    names = (target.parent / f"{target.name}-kept-{number}" for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def _make_durable(path: Path) -> None:
    """Write what the system has in memory of a file, or of all files below a folder, to disk."""
    names = [path / name for name in files_below(path)] if path.is_dir() else [path]
    for name in names:
        if os.path.islink(name):
            continue
        handle = os.open(name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_if_empty(folder: Path) -> bool:
    """Remove a folder that is empty; return whether it is gone."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
