"""The bytes of a data file: here or behind a URL, unpacked, one stream for each file in an archive.

What a file unpacks to is bounded, and a file that ends too early is an error, whatever packed it.
"""

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from zstandard import ZstdDecompressor, ZstdError

from jaxtune.core.errors import UserError, first_line
from jaxtune.core.text import without_credentials

DAMAGED = (
    OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, ZstdError,
    NotImplementedError,
)  # fmt: skip
"""What reading a damaged file raises."""

PACKED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zip")
"""Suffixes of what is unpacked as it is read."""

_WILD = re.compile(r"[*?\[]")
_MOST_TIMES, _SMALL = 1000, 1 << 30
_FED_BYTES = 1 << 10  # a frame of zstd may unpack to 32,768 times as much
_STEP_BYTES = 1 << 20


def file_name(path: str) -> str:
    """Return the name of a file, of a URL the one in its path, without query and fragment."""
    path = urlsplit(path).path if path.startswith(("http://", "https://")) else path
    return PurePosixPath(path).name


def is_archive(path: str) -> bool:
    """Return whether a file may hold several."""
    return file_name(path).lower().endswith(".zip")


def open_bytes(path: str) -> BinaryIO:
    """Open a file here or behind a URL.

    Raises:
        UserError: it cannot be opened.

    """
    try:
        if "://" not in path:
            return open(path, "rb")
        system, name = remote_system(path)
        return io.BufferedReader(_Remote(system.open(name, "rb")), _STEP_BYTES)
    except UserError:
        raise
    except Exception as error:  # whatever the library of the protocol raises
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(without_credentials(f"{path} cannot be opened: {reason}.")) from None


def remote_system(url: str) -> tuple[Any, str]:
    """Return the file system that a URL names, and the path there.

    Raises:
        UserError: its library is not installed, or there is no such system.

    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(without_credentials(f"{url}: {error}.")) from None


def remote_files(url: str) -> list[str]:
    """Return the URLs of the files that a URL means: with wildcards, all that match, in order.

    Raises:
        UserError: there is none, or the system cannot be asked.

    """
    system, path = remote_system(url)
    # In a web address a question mark begins the query.
    wild = "*" in path or (not url.startswith(("http://", "https://")) and _WILD.search(path))
    try:
        names = sorted(system.glob(path)) if wild else [path]
        urls = [system.unstrip_protocol(name) for name in names if system.isfile(name)]
    except Exception as error:  # whatever the library of the protocol raises
        reason = first_line(error)
        raise UserError(without_credentials(f"{url} cannot be opened: {reason}.")) from None
    if not urls:
        raise UserError(without_credentials(f"{url}: there is no such file."))
    return urls


def remote_identity(url: str) -> str | None:
    """Return a text that changes when the object behind a URL does: its tag or time and its size;
    None where the server says neither.
    """
    system, path = remote_system(url)
    if not url.startswith(("http://", "https://")):
        return system.ukey(path)
    details = system.info(path)
    marks = [details.get(key) for key in ("ETag", "Content-MD5", "Digest", "Last-Modified")]
    return f"{url} {marks} {details.get('size')}" if any(marks) else None


def streams(raw: BinaryIO, path: str) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the name and the unpacked bytes of what a file holds: of a zip archive each file in it,
    of any other the one.

    Args:
        raw: the open file.
        path: its name, whose suffix says how it is packed.

    Raises:
        one of DAMAGED: it is damaged, or unpacks to more than 1000 times its size and a gibibyte.

    """
    suffix = PurePosixPath(file_name(path).lower()).suffix
    if suffix not in PACKED:
        yield path, raw
    elif is_archive(path):
        yield from _members(raw, path)
    else:
        opened = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else _Parts(raw, _UNPACKERS[suffix])
        bounded = _Bounded(cast(BinaryIO, opened), raw.tell)
        yield path, io.BufferedReader(bounded, _STEP_BYTES)


def _members(raw: BinaryIO, path: str) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(raw) as archive:
        members = [
            member
            for member in archive.infolist()
            if not member.is_dir()
            and not any(part.startswith((".", "__MACOSX")) for part in member.filename.split("/"))
        ]
        for member in members:
            if member.flag_bits & 1:
                raise zipfile.BadZipFile(f"{member.filename} in it is encrypted")
            name = path if len(members) == 1 else f"{path}/{member.filename}"
            if is_archive(member.filename):
                raise zipfile.BadZipFile(f"{member.filename} in it is an archive too. Unpack it")
            size = member.compress_size
            with archive.open(member) as opened:
                bounded = _Bounded(cast(BinaryIO, opened), lambda size=size: size)
                buffered = io.BufferedReader(bounded, _STEP_BYTES)
                for _, stream in streams(buffered, member.filename):
                    yield name, stream


class _Remote(io.RawIOBase):
    """A file of fsspec as Python's own: fsspec's `readline` takes no limit, and where a server
    knows no ranges the file cannot seek.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # whatever the library of the protocol raises
            raise OSError(without_credentials(first_line(error))) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Bounded(io.RawIOBase):
    """An unpacked stream that ends with an error where it grows out of proportion.

    Args:
        stream: the unpacked bytes.
        packed: returns how many packed ones they come from.

    """

    def __init__(self, stream: BinaryIO, packed: Callable[[], int]) -> None:
        self._stream, self._packed, self._size = stream, packed, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._size += len(data)
        if self._size > max(_SMALL, _MOST_TIMES * self._packed()):
            raise OSError(
                f"it unpacks to more than {_MOST_TIMES} times its size. If that is meant, unpack "
                "it first"
            )
        return len(data)


_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".lzma": lzma.LZMADecompressor,
    ".zst": lambda: ZstdDecompressor().decompressobj(),
}


class _Parts(io.RawIOBase):
    """All parts of a packed stream, one after the other. The readers of the libraries end silently
    at a part that is cut short (zstd) or damaged at its beginning (bz2, xz).
    """

    def __init__(self, raw: BinaryIO, unpacker: Callable[[], Any]) -> None:
        self._raw, self._unpacker = raw, unpacker
        self._part: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def _advance(self) -> bool:
        """Unpack the next bytes; return whether there are any."""
        data = b""
        if getattr(self._part, "needs_input", True):
            data, self._packed = self._packed or self._raw.read(_FED_BYTES), b""
            if not data and self._part is not None:
                raise EOFError("it ends too early. Download or write it again")
            if not data:
                return False
            if self._part is None and not (data := data.lstrip(b"\0")):
                return True  # xz may be padded between its parts
        self._part = self._part or self._unpacker()
        limits = (_STEP_BYTES,) if hasattr(self._part, "needs_input") else ()
        self._unpacked = memoryview(self._part.decompress(data, *limits))
        if self._part.eof:
            self._packed, self._part = self._part.unused_data, None
        return True
