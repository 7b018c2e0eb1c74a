"""Where rows come from: files, directories, globs, data sets of the hub; each row with its
location.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from jaxtune.config.schema import DataSource
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import check_inside
from jaxtune.core.text import without_credentials
from jaxtune.data.sources.opening import (
    DAMAGED,
    is_archive,
    open_bytes,
    remote_files,
    remote_identity,
    streams,
)
from jaxtune.data.sources.readers import READERS, reader_of
from jaxtune.data.sources.row import Row, RowError, RowLocation

TRAIN, EVAL = "train", "eval"
_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "eval": "validation", "evaluation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_SPLITS_OF = {TRAIN: ("train",), EVAL: ("validation", "test")}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
_GLOB = re.compile(r"[*?\[]")


class RowSource(Protocol):
    """Rows that can be read again and again in the same order."""

    name: str

    def rows(self) -> Iterator[Row | RowError]:
        """Yield all rows in order, a `RowError` for each that cannot be read."""
        ...

    def identity(self) -> str | None:
        """Return a text that changes when the rows change, without parsing them; None where only
        reading would tell.
        """
        ...

    def progress(self) -> tuple[int, int]:
        """Return `(done, total)` of the rows being read, in bytes or rows; total is 0 where it is
        not known.
        """
        ...


def open_source(entry: DataSource, part: str) -> RowSource:
    """Open what an entry of `data.train` or `data.eval` names.

    Args:
        entry: a path, a directory, a glob, a URL or a data set of the hub, with its split.
        part: `train` or `eval`: which split to read where the entry names none.

    Raises:
        UserError: there is no such file, or no such split.

    """
    path = Path(entry.source).expanduser()
    if "://" in entry.source:
        return Files(entry.source, remote_files(entry.source), entry.rows)
    if path.is_file():
        if entry.split:
            raise UserError(
                f"{entry.source} is a single file and has no split '{entry.split}'. Remove split, "
                "or name the directory."
            )
        return Files(entry.source, [str(path)], entry.rows)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return DataSet(entry, part, saved=True)
        return Files(entry.source, _files_in(path, entry.split, part), entry.rows)
    if _GLOB.search(entry.source):
        paths = sorted(
            name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)
        )
        for name in paths:
            check_inside(_glob_root(path), Path(name))
        if not paths:
            raise UserError(f"{entry.source}: no file matches.")
        return Files(entry.source, paths, entry.rows)
    if _HUB_NAME.fullmatch(entry.source) and reader_of(entry.source) is None:
        return DataSet(entry, part)
    raise UserError(
        f"{entry.source} is not a file. Give a file, a directory, a glob or the hub's name of a "
        "data set."
    )


class Files:
    """Rows of files, one file after the other.

    Args:
        name: what the user wrote.
        paths: the files.
        limit: the most rows to read; all by default.

    """

    def __init__(self, name: str, paths: list[str], limit: int | None = None) -> None:
        self.name, self.paths, self.limit = without_credentials(name), paths, limit
        self._done, self._open, self._size = 0, None, 0
        for path in paths:
            _check_reader(path)

    def rows(self) -> Iterator[Row | RowError]:
        """Yield all rows in order; report a source without rows like a bad row."""
        yield from islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[Row | RowError]:
        self._done, empty = 0, True
        self._size = sum(os.path.getsize(path) for path in self.paths if "://" not in path)
        for path in self.paths:
            with open_bytes(path) as raw:
                self._open = raw
                for row in _rows_of(raw, path):
                    empty = False
                    yield row
            self._done += os.path.getsize(path) if "://" not in path else 0
            self._open = None
        if empty:
            yield RowError(RowLocation(self.name, 0), "there are no rows")

    def identity(self) -> str | None:
        """Return the SHA-256 of names and contents."""
        digest = hashlib.sha256(repr(self.limit).encode())
        for path in self.paths:
            digest.update(f"\0{path}\0".encode())
            if "://" in path:
                # The object's time or tag, so that it is not downloaded twice.
                tag = remote_identity(path)
                if tag is None:
                    return None
                digest.update(tag.encode())
                continue
            with open_bytes(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def progress(self) -> tuple[int, int]:
        """Return the bytes read and their total, compressed where the files are."""
        inside = self._open.tell() if self._open and not self._open.closed else 0
        return self._done + inside, self._size


def _rows_of(raw: Any, path: str) -> Iterator[Row | RowError]:
    """Yield the rows of an open file; of an archive those of all its data files, of which there
    must be one.
    """
    shown = without_credentials(path)
    try:
        archive, is_empty = is_archive(path), True
        for name, handle in streams(raw, path):
            reader = reader_of(name) or (None if archive and name != path else reader_of(path))
            if reader is not None:
                is_empty = False
                yield from reader(handle, without_credentials(name))
        if archive and is_empty:
            yield RowError(
                RowLocation(shown, 0), f"there is no data file in it ({listed(sorted(READERS))})"
            )
    except DAMAGED as error:
        yield RowError(RowLocation(shown, 0), f"cannot be read to its end: {error}")


def _check_reader(path: str) -> None:
    if reader_of(path) is None and not is_archive(path):
        kinds = listed(sorted(READERS))
        raise UserError(
            f"{without_credentials(path)}: files of this kind are not read. Known are {kinds}, "
            "each also compressed (.gz, .bz2, .xz, .zst, .zip)."
        )


class DataSet:
    """Rows of a data set of the hub, or of one that `datasets` saved to disk.

    A set of which only the first rows are read is streamed instead of downloaded.

    Args:
        entry: its name, its split and the number of rows.
        part: `train` or `eval`; see `open_source`.
        saved: whether it lies on disk.

    """

    def __init__(self, entry: DataSource, part: str, saved: bool = False) -> None:
        self.entry, self._done = entry, 0
        with _explain_errors(entry):
            self._data, split = _load_saved(entry, part) if saved else _load_from_hub(entry, part)
        self.name = f"{entry.source}[{split}]" if split else entry.source

    def rows(self) -> Iterator[Row | RowError]:
        """Yield all rows in order, numbered from 1."""
        with _explain_errors(self.entry):
            for number, value in enumerate(islice(iter(self._data), self.entry.rows), 1):
                self._done = number
                yield Row(RowLocation(self.name, number), dict(value))

    def identity(self) -> str | None:
        """Return the library's fingerprint; None for a stream."""
        fingerprint = getattr(self._data, "_fingerprint", None)
        return fingerprint and f"{self.name}:{fingerprint}:{self.entry.rows}"

    def progress(self) -> tuple[int, int]:
        """Return the rows read and their number."""
        size = self.entry.rows or (len(self._data) if hasattr(self._data, "__len__") else 0)
        return self._done, size


def _load_saved(entry: DataSource, part: str) -> tuple[Any, str | None]:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(Path(entry.source).expanduser()))
    if not isinstance(data, DatasetDict):
        return data, None
    split = _select_split(entry, part, [str(name) for name in data])
    return data[split], split


def _load_from_hub(entry: DataSource, part: str) -> tuple[Any, str]:
    from datasets import get_dataset_split_names, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    name, _, revision = entry.source.partition("@")
    options: dict[str, Any] = {"revision": revision or None}
    split = entry.split or _select_split(
        entry, part, get_dataset_split_names(name, entry.name, revision=revision or None)
    )
    options["streaming"] = entry.rows is not None
    return load_dataset(name, entry.name, split=split, **options), split


@contextmanager
def _explain_errors(entry: DataSource) -> Iterator[None]:
    """Turn whatever the library raises about a data set into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{error}".strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{entry.source} is neither a file here nor a data set that can be read from the hub: "
            f"{reason}"
        ) from None


def _select_split(entry: DataSource, part: str, names: list[str]) -> str:
    """Return the split to read: the entry's, or else the one that fits the part."""
    if entry.split:
        if entry.split not in names:
            raise UserError(f"{entry.source} has no split '{entry.split}'. It has {listed(names)}.")
        return entry.split
    for split in _SPLITS_OF[part]:
        if split in names:
            return split
    if len(names) == 1 and part == TRAIN:
        return names[0]
    raise UserError(
        f"{entry.source} has the splits {listed(names)}. Say which: "
        f"data.{part}=[{{source: {entry.source}, split: {names[0]}}}]"
    )


def _files_in(root: Path, split: str | None, part: str) -> list[str]:
    """Return a directory's data files, sorted by name; text files count only where there are no
    others.
    """
    files = [
        file
        for file in sorted(root.rglob("*"))
        if not file.is_dir()
        and reader_of(file.name)
        and not any(p.startswith((".", "_")) for p in file.relative_to(root).parts)
    ]
    for file in files:
        check_inside(root, file)
    files = [file for file in files if file.name not in ("dataset_info.json", "dataset_infos.json")]
    files = [file for file in files if not _is_text(file)] or files
    if not files:
        raise UserError(f"{root} has no data file ({listed(sorted(READERS))}).")
    splits = {file: _split_of(file.relative_to(root)) for file in files}
    names = sorted({name for name in splits.values() if name})
    if split is None and not names:
        return [str(file) for file in files]
    split = _SPLIT_WORDS.get(split or "", split) or next(
        (name for name in _SPLITS_OF[part] if name in names), None
    )
    paths = [str(file) for file in files if splits[file] == split]
    if not paths or split is None:
        advice = f"Say which: data.{part}=[{{source: {root}, split: {(names or ['train'])[0]}}}]"
        raise UserError(
            f"{root} has no files of the split '{split or _SPLITS_OF[part][0]}'; there are "
            f"{listed(names) or 'none'}. {advice}"
        )
    return paths


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name, or else a folder's, says."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _is_text(file: Path) -> bool:
    return reader_of(file.name) is READERS[".txt"]


def _glob_root(pattern: Path) -> Path:
    """Return the folder that a pattern names before its first wildcard."""
    return next(parent for parent in pattern.parents if not _GLOB.search(str(parent)))
