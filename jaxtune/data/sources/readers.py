"""One reader a kind of file: from bytes to rows, one after the other, so that no file needs to
fit in memory.
"""

import csv
import io
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from jaxtune.data.sources.opening import PACKED, file_name
from jaxtune.data.sources.parquet import read_parquet
from jaxtune.data.sources.row import LONGEST, Row, RowError, RowLocation

FileReader = Callable[[BinaryIO, str], Iterator[Row | RowError]]
"""Yields the rows of an open file; the second argument is its path, for the rows' locations."""

_DOCUMENT_BYTES = 1 << 20
_MOST_VALUES = 1 << 22
_UNBOUNDED = 1 << 40
_UTF8_BOM, _UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


def reader_of(path: str) -> FileReader | None:
    """Return the reader for a file's suffix, ignoring that of a compression; None where there is
    none.
    """
    name = PurePosixPath(file_name(path).lower())
    if name.suffix in PACKED:
        name = PurePosixPath(name.stem)
    return READERS.get(name.suffix)


def read_json_lines(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """Read JSON Lines: an object a line; blank lines are skipped."""
    for number, line in _lines(handle):
        location = RowLocation(path, number)
        if line is None:
            yield RowError(location, f"a line of more than {LONGEST >> 20} MiB")
        elif number == 1 and line.startswith(_UTF16_BOMS):
            yield RowError(location, "the file is UTF-16. Convert it to UTF-8.")
            return
        elif line.strip():
            yield _parse(line.removeprefix(_UTF8_BOM) if number == 1 else line, location)


def read_json_file(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """Read an array of objects, an object that holds one such array, a single object, or JSON
    Lines under another name.
    """
    raw: Any = handle
    buffered = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
    first = buffered.peek(1 << 16).removeprefix(_UTF8_BOM).lstrip()
    if first.startswith(b"["):
        yield from _read_array(buffered, path)
    elif _is_object(first.split(b"\n", 1)[0]):
        yield from read_json_lines(buffered, path)
    else:
        yield from _read_object(buffered.read(LONGEST + 1), path)


def read_table(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """Read CSV or TSV with a header line; the separator is the one of , ; | and tab that the
    header has most of.
    """
    with io.TextIOWrapper(
        handle, encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        yield from _read_cells(text, path)


def _read_cells(text: io.TextIOWrapper, path: str) -> Iterator[Row | RowError]:
    source = _BoundedLines(text)
    header = source.header()
    separator = max(",;|\t", key=header.count)
    try:
        names = next(csv.reader([header], delimiter=separator), [])
        if len(names) > _MOST_VALUES >> 8:
            raise csv.Error(f"a header of {len(names):,} columns")
    except csv.Error as error:
        yield RowError(RowLocation(path, 1), f"not valid CSV: {error}")
        return
    # Strict: else all rows after a quote that is not closed would be read as one cell.
    lines = csv.reader(source, delimiter=separator, strict=True)
    while True:
        location = RowLocation(path, source.number + 1)
        source.size = 0
        # A setting of the whole process. The lines are bounded, so cells need no limit of theirs.
        before = csv.field_size_limit(_UNBOUNDED)
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowError(location, f"not valid CSV: {error}")
            if source.is_over:
                return
            continue
        finally:
            csv.field_size_limit(before)
        if not cells:
            continue
        if len(cells) != len(names):
            yield RowError(
                location,
                f"{len(cells)} cells, and the header has {len(names)}. Quote cells that hold "
                "the separator.",
            )
        elif not all(map(is_text, cells)):
            yield RowError(location, "not UTF-8. Convert the file to UTF-8.")
        else:
            yield Row(location, dict(zip(names, cells, strict=True)))


class _BoundedLines:
    """The lines of a table, each read only as far as a row may be long.

    Attributes:
        number: of the last line read, from 1.
        size: characters read; set to 0 where a row begins.
        is_over: whether the file ended, or a row was too long.

    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self.number, self.size, self.is_over = text, 1, 0, False

    def header(self) -> str:
        """Return the first line, or its first mebibyte."""
        return self._text.readline(1 << 20)

    def __iter__(self) -> "_BoundedLines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(LONGEST)
        self.is_over = not line
        if not line:
            raise StopIteration
        self.number += 1
        self.size += len(line)
        if self.size >= LONGEST:
            self.is_over = True
            raise csv.Error(f"a row of more than {LONGEST >> 20} MiB; the rest is not read")
        return line


def read_text_file(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """Read a text file as one document, or one of more than a mebibyte as several that end where
    lines end.
    """
    lines: list[bytes] = []
    size, start = 0, 1
    for number, line in _lines(handle):
        if line is None:
            yield RowError(RowLocation(path, number), f"a line of more than {LONGEST >> 20} MiB")
            continue
        lines.append(line)
        size += len(line)
        if size >= _DOCUMENT_BYTES:
            yield _decode_document(lines, RowLocation(path, start))
            lines, size, start = [], 0, number + 1
    if any(line.strip() for line in lines):
        yield _decode_document(lines, RowLocation(path, start))


READERS: dict[str, FileReader] = {
    ".jsonl": read_json_lines, ".ndjson": read_json_lines, ".json": read_json_file,
    ".csv": read_table, ".tsv": read_table, ".parquet": read_parquet,
    ".txt": read_text_file, ".text": read_text_file,
}  # fmt: skip
"""Readers by suffix."""


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield `(number, line)`; None for a line that is too long, which is skipped."""
    number = 0
    while line := handle.readline(LONGEST):
        number += 1
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (rest := handle.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line


def _parse(line: bytes, location: RowLocation) -> Row | RowError:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(location, f"not UTF-8 ({error.reason}). Convert the file to UTF-8.")
    if _has_many_values(text):
        return RowError(location, f"more than {_MOST_VALUES:,} values in a row")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError(
            location, f"not valid JSON: {_reason(error)}. Each line must be one JSON object."
        )
    return _row_of(value, location)


def _has_many_values(text: str) -> bool:
    """Return whether JSON has so many values that they would take gigabytes, whatever they are."""
    return len(text) > _MOST_VALUES and sum(map(text.count, ",[{")) > _MOST_VALUES


def _row_of(value: Any, location: RowLocation) -> Row | RowError:
    if isinstance(value, dict):
        return Row(location, value)
    return RowError(
        location,
        f"a {type(value).__name__} instead of a JSON object with messages, prompt and completion, "
        "or text.",
    )


def _decode_document(lines: list[bytes], location: RowLocation) -> Row | RowError:
    try:
        return Row(location, {"text": b"".join(lines).decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        line = location.line + error.object[: error.start].count(b"\n")
        return RowError(
            RowLocation(location.file, line),
            f"not UTF-8 ({error.reason}). Convert the file to UTF-8.",
        )


def _read_array(handle: io.BufferedReader, path: str) -> Iterator[Row | RowError]:
    """Yield the elements of a JSON array, read a part at a time."""
    with io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape") as text:
        yield from _read_elements(text, path)


def _read_elements(text: io.TextIOWrapper, path: str) -> Iterator[Row | RowError]:
    decoder, size = json.JSONDecoder(), 1 << 16
    before, _, buffer = text.read(size).partition("[")
    line = 1 + before.count("\n")
    while True:
        rest = buffer.lstrip(" \t\r\n,")
        line += buffer[: len(buffer) - len(rest)].count("\n")
        buffer, location = rest, RowLocation(path, line)
        if buffer.startswith("]"):
            buffer = yield from _after_array(buffer[1:], text, location)
            if not buffer:
                return
            continue
        try:
            if _has_many_values(buffer):
                yield RowError(location, f"more than {_MOST_VALUES:,} values from here on")
                return
            value, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError) as error:
            hopeless = isinstance(error, RecursionError) or len(buffer) > LONGEST
            more = "" if hopeless else text.read(size)
            if not more:
                yield RowError(location, f"not valid JSON from here on: {_reason(error)}.")
                return
            # Twice as much each time: the time for a long element stays linear in its length.
            buffer, size = buffer + more, size * 2
            continue
        line += buffer.count("\n", 0, end)
        yield (
            _row_of(value, location)
            if is_text(buffer[:end])
            else RowError(location, "not UTF-8. Convert the file to UTF-8.")
        )
        buffer, size = buffer[end:], 1 << 16


def _after_array(
    rest: str, text: io.TextIOWrapper, location: RowLocation
) -> Generator[RowError, None, str]:
    """Return what follows the opening bracket of another array; yield an error where anything else
    follows one.
    """
    while not (rest := rest.lstrip(" \t\r\n,")):
        if not (rest := text.read(1 << 16)):
            return ""
    if rest.startswith("["):
        return rest[1:] or text.read(1 << 16)
    yield RowError(location, f"after this array comes {rest[:20]!r}. Write one array of all rows.")
    return ""


def is_text(value: str) -> bool:
    """Return whether a string can be written in UTF-8: it has no half of a surrogate pair."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_object(data: bytes, path: str) -> Iterator[Row | RowError]:
    """Yield the rows of a file that is one object: those of the one list of objects it holds, or
    else the object itself.
    """
    if len(data) > LONGEST:
        yield RowError(
            RowLocation(path, 1),
            f"one JSON object of more than {LONGEST >> 20} MiB. Write an array, or an object a "
            "line.",
        )
        return
    parsed = _parse(data.removeprefix(_UTF8_BOM), RowLocation(path, 1))
    if isinstance(parsed, RowError):
        yield parsed
        return
    lists = [value for key, value in parsed.value.items() if _holds_rows(key, value)]
    if len(lists) == 1:
        yield from (
            Row(RowLocation(path, number), value) for number, value in enumerate(lists[0], 1)
        )
    else:
        yield parsed


def _holds_rows(key: str, value: Any) -> bool:
    if key in ("messages", "conversations", "conversation", "tools"):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
