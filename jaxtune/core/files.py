"""Files and folders that are complete or absent: written under a temporary name, then renamed."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError

_MODEL_SUFFIXES = (
    ".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin", ".pth", ".gguf",
)  # fmt: skip


def shown(path: str | Path) -> str:
    """Return a path as a person would type it: relative to the working directory, if inside it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace the file at `path` by `text`; readers see the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write `rows` as JSON Lines, completely or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    """Return the user's cache folder: `$XDG_CACHE_HOME/jaxtune`, or `~/.cache/jaxtune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtune"


def cache_root() -> Path:
    """Return where plans and tokenized data are cached: `JAXTUNE_CACHE`, or the default folder."""
    return Path(os.environ.get("JAXTUNE_CACHE") or default_cache_root())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; other processes and threads wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse_existing(target: Path) -> None:
    """Refuse to overwrite what is at `target`.

    Raises:
        UserError: `target` is a file, or a directory that holds something.

    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
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
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield staging / target.name
        os.replace(staging / target.name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a directory beside `target` to fill; it takes the name `target` if the block succeeds.

    Args:
        target: the directory to make.
        replace: whether an existing `target` is replaced, which happens only after success.

    Raises:
        UserError: `target` exists and is not empty, and `replace` is false.

    """
    if not replace:
        refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield staging
        os.chmod(staging, 0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
