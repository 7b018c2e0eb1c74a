"""One reader a kind of file: from bytes to rows, one after the other, so that no file needs to
fit in memory.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from jaxtune.data.sources.row import Row, RowError, RowLocation

FileReader = Callable[[BinaryIO, str], Iterator[Row | RowError]]
"""Yields the rows of an open file; the second argument is its path, for the rows' locations."""

LONGEST = 64 << 20
"""Bytes of the longest line, cell or array element that is read; a longer one is a bad row."""
_DOCUMENT_BYTES = 1 << 20
_BATCH = 256
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zip")
_UTF8_BOM, _UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


def reader_of(path: str) -> FileReader | None:
    """Return the reader for a file's suffix, ignoring that of a compression; None where there is
    none.
    """
    name = PurePosixPath(path.lower())
    if name.suffix in _COMPRESSED:
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
    header = text.readline(1 << 20)
    separator = max(",;|\t", key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    lines = csv.reader(text, delimiter=separator)
    before = csv.field_size_limit(LONGEST)  # a setting of the whole process: restored at the end
    try:
        while True:
            location = RowLocation(path, lines.line_num + 2)
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield RowError(location, f"not valid CSV: {error}")
                continue
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
    finally:
        csv.field_size_limit(before)


def read_parquet(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """Read Parquet, rows numbered from 1."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(handle).iter_batches(batch_size=_BATCH):
            for value in batch.to_pylist():
                number += 1
                yield Row(RowLocation(path, number), value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield RowError(
            RowLocation(path, number + 1),
            f"not a whole Parquet file from here on: {str(error).splitlines()[0]}",
        )


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
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError(
            location, f"not valid JSON: {_reason(error)}. Each line must be one JSON object."
        )
    return _row_of(value, location)


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
            return
        try:
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
