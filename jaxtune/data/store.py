"""Tokenized rows on disk: written once as they stream by, memory-mapped afterwards.

A store is a directory that takes its name when it is complete, so a crash leaves nothing
half-written under that name, and of two processes that write the same one the first wins and the
second uses it.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxtune.core.errors import UserError
from jaxtune.core.files import cache_root, read_json
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.batch import CHOSEN, REJECTED
from jaxtune.data.block_digests import BlockDigests, is_intact
from jaxtune.data.chat.tokenize import Document
from jaxtune.data.sources.row import RowLocation

VERSION = 2
"""Increased whenever the same rows would give other files."""

VERIFY_ALL = "JAXTUNE_VERIFY_CACHE"
"""Set in the environment, a store is compared with its digests as a whole when it is opened,
and not only in a sample of its blocks.
"""

TEXT, REWRITTEN, TWO_BOS, NOT_ENDED, GOOD, BAD = 1, 2, 4, 8, 16, 32
"""Marks of a document: raw text; one answer's part of a row; begins with BOS twice; its last
answer has no end-of-turn token; where answers are compared, a preferred or good one, a rejected
or bad one.
"""

# `tokens` and `spans` count those of all documents up to and including this one.
_DOCUMENT = np.dtype([
    ("tokens", "<i8"), ("spans", "<i8"), ("file", "<i4"), ("line", "<i8"),
    ("row", "<u8"), ("prompt", "<u8"), ("answer", "<u8"), ("marks", "<u4"),
])  # fmt: skip
_SPAN = np.dtype([("begin", "<i4"), ("end", "<i4"), ("weight", "<f4")])
_MANIFEST = "manifest.json"
_ARRAYS = {"ids": np.dtype("<i4"), "documents": _DOCUMENT, "spans": _SPAN}
_UNFINISHED = ".unfinished."
_STALE_SECONDS = 24 * 3600
_MOST_BYTES = 50 << 30
_PROBED_DOCUMENTS, _PROBED_TOKENS = 1 << 14, 1 << 22  # where the ends of answers are looked up


@dataclass(frozen=True)
class Store:
    """Tokenized rows.

    Attributes:
        path: the directory.
        manifest: the format, the kinds of rows (text, plain or chat), bad rows, the largest token,
            a digest of the contents.

    """

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def ids(self) -> np.ndarray:
        """Return all tokens, int32."""
        return self._array("ids")

    @cached_property
    def documents(self) -> np.ndarray:
        """Return a record a document."""
        return self._array("documents")

    @cached_property
    def spans(self) -> np.ndarray:
        """Return a record a supervised range of tokens: begin and end in its document, weight."""
        return self._array("spans")

    def location(self, document: int) -> RowLocation:
        """Return where a document comes from."""
        record = self.documents[document]
        return RowLocation(self.manifest["files"][record["file"]], int(record["line"]))

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return a copy of the tokens from `begin` to before `end`."""
        tokens = np.array(self.ids[begin:end])
        self.release("ids")
        return tokens

    def answer_ends(self, special: Collection[int]) -> list[int]:
        """Return the special tokens that end supervised answers, and are not mostly inside of them,
        in the first documents.
        """
        records = self.documents[:_PROBED_DOCUMENTS]
        records = records[: np.searchsorted(records["tokens"], _PROBED_TOKENS, "right")]
        size, tokens = len(records), records["tokens"].astype(np.int64)
        spans = self.spans[: int(records["spans"][-1]) if size else 0]
        owner = np.repeat(np.arange(size), np.diff(records["spans"], prepend=0))
        spans, owner = spans[chats := (records["marks"][owner] & TEXT) == 0], owner[chats]
        starts = np.concatenate([[0], tokens])[owner]
        ids = np.array(self.ids[: int(tokens[-1]) if size else 0])
        ends = ids[starts + spans["end"] - 1]
        inside = np.zeros(len(ids) + 1, np.int32)
        np.add.at(inside, starts + spans["begin"], 1)
        np.add.at(inside, starts + spans["end"] - 1, -1)
        within = ids[np.cumsum(inside)[:-1] > 0]
        self.release()
        return [
            int(token)
            for token, count in zip(*np.unique(ends, return_counts=True), strict=True)
            if int(token) in special and count > np.count_nonzero(within == token)
        ]

    def release(self, *names: str) -> None:
        """Drop the pages read of these files from memory, by default those of the records and
        spans: else a file read to its end would count as the process's memory in full.
        """
        for name in names or ("documents", "spans"):
            if name in self._maps:
                self._maps[name].madvise(mmap.MADV_DONTNEED)

    @cached_property
    def _maps(self) -> dict[str, mmap.mmap]:
        maps = {}
        for name in _ARRAYS:
            if self.manifest["counts"][name]:  # an empty file cannot be mapped
                with (self.path / name).open("rb") as file:
                    maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return maps

    def _array(self, name: str) -> np.ndarray:
        if name not in self._maps:
            return np.zeros(0, _ARRAYS[name])
        return np.frombuffer(self._maps[name], _ARRAYS[name])


class Writer:
    """Writes the files of a store.

    Args:
        directory: an empty directory.
        tokenizer: for its special tokens.

    """

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self._directory = directory
        self._files: dict[str, BinaryIO] = {
            name: open(directory / name, "wb", opener=_private)  # noqa: SIM115 (see `abandon`)
            for name in _ARRAYS
        }
        self._counts = dict.fromkeys(_ARRAYS, 0)
        self._names: dict[str, int] = {}
        self._digest = hashlib.blake2b(digest_size=16)
        self._blocks = {name: BlockDigests() for name in _ARRAYS}
        self._largest = -1
        self._kinds: set[str] = set()
        self._bos = tokenizer.bos_token_id
        self._special = special_ids(tokenizer)

    def add(self, documents: Iterable[Document]) -> None:
        """Append documents."""
        ids, spans, records = [], [], []
        tokens, ranges = self._counts["ids"], self._counts["spans"]
        for document in documents:
            conversation = document.conversation
            location = conversation.location
            if not isinstance(location, RowLocation):
                location = RowLocation(str(location), 0)
            file = self._names.setdefault(location.file, len(self._names))
            self._kinds.add(
                "text" if conversation.text else "plain" if conversation.plain else "chat"
            )
            tokens += len(document.ids)
            ranges += len(document.spans)
            ids.append(document.ids)
            spans += [(span.begin, span.end, span.weight) for span in document.spans]
            digests = conversation.digests()
            records.append((tokens, ranges, file, location.line, *digests, self._marks(document)))
        if not records:
            return
        all_ids = np.concatenate(ids)
        self._largest = max(self._largest, int(all_ids.max(initial=-1)))
        self._write("ids", all_ids)
        self._write("spans", np.array(spans, _SPAN))
        self._write("documents", np.array(records, _DOCUMENT))

    @property
    def tokens(self) -> int:
        """Return the number of tokens written."""
        return self._counts["ids"]

    def close(self, entries: dict[str, Any]) -> None:
        """Write the manifest and flush all files to disk.

        Args:
            entries: what else the manifest holds: the source, the format and the bad rows.

        """
        manifest = entries | {
            "version": VERSION,
            "counts": self._counts,
            "files": list(self._names),
            "digest": self._digest.hexdigest(),
            "blocks": {name: blocks.close() for name, blocks in self._blocks.items()},
            "largest_token": self._largest,
            "kinds": sorted(self._kinds),
        }
        path = self._directory / _MANIFEST
        with open(path, "w", encoding="utf-8", opener=_private) as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.abandon()

    def abandon(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, values: np.ndarray) -> None:
        data = values.astype(_ARRAYS[name], copy=False).tobytes()
        self._files[name].write(data)
        self._blocks[name].update(data)
        self._counts[name] += len(values)
        if name != "documents":
            self._digest.update(data)

    def _marks(self, document: Document) -> int:
        ids, spans = document.ids, document.spans
        marks = TEXT if document.conversation.text else 0
        marks |= REWRITTEN if document.rewritten else 0
        marks |= {CHOSEN: GOOD, REJECTED: BAD}.get(document.conversation.label, 0)
        if self._bos is not None and len(ids) > 1 and ids[0] == ids[1] == self._bos:
            marks |= TWO_BOS
        if spans and int(ids[spans[-1].end - 1]) not in self._special:
            marks |= NOT_ENDED
        return marks


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of a tokenizer's special tokens, named ones and added ones."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *added}


def cache_directory() -> Path:
    """Return where stores are kept."""
    return cache_root() / "tokens"


def open_store(path: Path) -> Store | None:
    """Return the store at `path`; None where there is none that is complete."""
    try:
        manifest = read_json(path / _MANIFEST)
        sizes = {name: (path / name).stat().st_size for name in _ARRAYS}
    except (UserError, OSError):
        return None
    if manifest.get("version") != VERSION or any(
        sizes[name] != manifest["counts"][name] * kind.itemsize for name, kind in _ARRAYS.items()
    ):
        return None
    with suppress(OSError):
        os.utime(path)  # the least recently used go first when room is needed
    store = Store(path, manifest)
    try:
        # Opened now: another process that makes room may remove the names.
        _ = store.ids, store.documents, store.spans
    except OSError:
        return None
    whole, digests = bool(os.environ.get(VERIFY_ALL)), manifest["blocks"]
    is_whole = all(is_intact(path / name, digests[name], whole=whole) for name in _ARRAYS)
    return store if is_whole else None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def new_store(path: Path, tokenizer: Tokenizer) -> Iterator[Writer]:
    """Give a `Writer` for a store that takes the name `path` at the end of the block, which must
    have called `close`.

    Raises:
        UserError: there is no room, or no right to write.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)  # rows may be private
        _make_room(path.parent)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=_UNFINISHED))
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written: {error.strerror}. Set JAXTUNE_CACHE to a directory "
            "that can."
        ) from None
    writer = None
    try:
        writer = Writer(staging, tokenizer)
        yield writer
        if open_store(path) is None:
            shutil.rmtree(path, ignore_errors=True)  # incomplete, or of another version
            try:
                os.replace(staging, path)
            except OSError:
                if open_store(path) is None:  # else another process was first
                    raise
    except OSError as error:
        raise UserError(
            f"{path.parent}: writing the tokenized data failed: {error.strerror or error}. Make "
            "room, or set JAXTUNE_CACHE to another directory."
        ) from None
    finally:
        if writer:
            writer.abandon()
        shutil.rmtree(staging, ignore_errors=True)


def _make_room(directory: Path) -> None:
    """Remove what crashes left behind and, beyond 50 GiB, the stores least recently used."""
    entries = []
    for entry in directory.iterdir():
        try:
            if entry.name.startswith(_UNFINISHED):
                newest = max(
                    (file.stat().st_mtime for file in entry.iterdir()),
                    default=entry.stat().st_mtime,
                )
                if time.time() - newest > _STALE_SECONDS:
                    shutil.rmtree(entry, ignore_errors=True)
            else:
                size = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.stat().st_mtime, size, entry))
        except OSError:  # another process makes room too
            continue
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= _MOST_BYTES:
            break
        shutil.rmtree(entry, ignore_errors=True)
        total -= size
