"""Where rows come from: files, directories, globs, data sets of the hub; each row with its
location.
"""

import glob
import hashlib
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from zstandard import ZstdError

from jaxtune.config.schema import DataSource
from jaxtune.core.errors import UserError, listed
from jaxtune.data.sources.readers import READERS, FileReader, reader_of
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
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, ZstdError)


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
        return Files(entry.source, _remote_files(entry.source), entry.rows)
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
        self.name, self.paths, self.limit = name, paths, limit
        self._done, self._open, self._size = 0, None, 0
        self._readers = [_require_reader(path) for path in paths]

    def rows(self) -> Iterator[Row | RowError]:
        """Yield all rows in order; report a source without rows like a bad row."""
        yield from islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[Row | RowError]:
        self._done, empty = 0, True
        self._size = sum(os.path.getsize(path) for path in self.paths if "://" not in path)
        for path, reader in zip(self.paths, self._readers, strict=True):
            with _open(path) as raw:
                self._open = raw
                try:
                    with _decompress(raw, path) as handle:
                        for row in reader(handle, path):
                            empty = False
                            yield row
                except _DAMAGED as error:
                    yield RowError(RowLocation(path, 0), f"cannot be read to its end: {error}")
                    empty = False
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
                digest.update(_remote_system(path)[0].ukey(path).encode())
                continue
            with _open(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def progress(self) -> tuple[int, int]:
        """Return the bytes read and their total, compressed where the files are."""
        inside = self._open.tell() if self._open and not self._open.closed else 0
        return self._done + inside, self._size


def _require_reader(path: str) -> FileReader:
    reader = reader_of(path)
    if reader is None:
        kinds = listed(sorted(READERS))
        raise UserError(
            f"{path}: files of this kind are not read. Known are {kinds}, each also compressed "
            "(.gz, .bz2, .xz, .zst, .zip)."
        )
    return reader


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
        if file.is_file()
        and reader_of(file.name)
        and not any(p.startswith((".", "_")) for p in file.relative_to(root).parts)
    ]
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


def _remote_files(url: str) -> list[str]:
    system, path = _remote_system(url)
    try:
        names = sorted(system.glob(path)) if _GLOB.search(path) else [path]
        urls = [system.unstrip_protocol(name) for name in names if system.isfile(name)]
    except (ValueError, OSError) as error:
        raise UserError(f"{url} cannot be opened: {error}.") from None
    if not urls:
        raise UserError(f"{url}: there is no such file.")
    return urls


def _remote_system(url: str) -> tuple[Any, str]:
    """Return the file system that a URL names, and the path there."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}.") from None


def _open(path: str) -> BinaryIO:
    try:
        if "://" not in path:
            return open(path, "rb")
        import fsspec

        remote: Any = fsspec.open(path, "rb")
        return remote.open()
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror or error}.") from None


def _decompress(raw: BinaryIO, path: str) -> BinaryIO:
    """Return a stream of what a compressed file holds, by its last suffix."""
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    kind = infer_compression(path)
    if kind is None:
        return raw
    known: Any = compr
    opened: Any = known[kind](raw, mode="rb")
    buffered: Any = opened if isinstance(opened, io.BufferedIOBase) else io.BufferedReader(opened)
    return buffered
