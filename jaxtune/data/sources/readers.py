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

LONGEST = 64 << 20
"""Bytes of the longest line, cell or array element that is read; what is longer is a bad row."""
_TEXT_PIECE = 1 << 20
_BATCH = 256
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zip")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def reader_of(path: str) -> FileReader | None:
    """The reader for a file's suffix, that of a compression apart; None where there is none."""
    name = PurePosixPath(path.lower())
    if name.suffix in _COMPRESSED:
        name = PurePosixPath(name.stem)
    return READERS.get(name.suffix)


def read_lines(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """JSON Lines: an object a line; blank lines are skipped."""
    for number, line in _lines(handle):
        place = RowLocation(path, number)
        if line is None:
            yield RowError(place, f"a line of more than {LONGEST >> 20} MiB")
        elif number == 1 and line.startswith(_UTF16):
            yield RowError(place, "the file is UTF-16. Convert it to UTF-8.")
            return
        elif line.strip():
            yield _parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)


def read_json(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """An array of objects, an object that holds one such array, a single object, or JSON Lines
    under another name.
    """
    raw: Any = handle
    buffered = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
    first = buffered.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if first.startswith(b"["):
        yield from _array(buffered, path)
    elif _is_object(first.split(b"\n", 1)[0]):
        yield from read_lines(buffered, path)
    else:
        yield from _whole(buffered.read(LONGEST + 1), path)


def read_table(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """CSV or TSV with a header line; the separator is that of , ; | and tab which the header has
    most of.
    """
    with io.TextIOWrapper(
        handle, encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        yield from _table(text, path)


def _table(text: io.TextIOWrapper, path: str) -> Iterator[Row | RowError]:
    header = text.readline(1 << 20)
    separator = max(",;|\t", key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    lines = csv.reader(text, delimiter=separator)
    before = csv.field_size_limit(LONGEST)  # a setting of the whole process: put back afterwards
    try:
        while True:
            place = RowLocation(path, lines.line_num + 2)
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield RowError(place, f"not valid CSV: {error}")
                continue
            if not cells:
                continue
            if len(cells) != len(names):
                yield RowError(
                    place,
                    f"{len(cells)} cells, and the header has {len(names)}. Quote cells that hold "
                    "the separator.",
                )
            elif not all(map(is_text, cells)):
                yield RowError(place, "not UTF-8. Convert the file to UTF-8.")
            else:
                yield Row(place, dict(zip(names, cells, strict=True)))
    finally:
        csv.field_size_limit(before)


def read_parquet(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """Parquet, rows numbered from 1."""
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


def read_text(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """A text file is one document; one of more than a mebibyte is cut into several at ends of
    lines.
    """
    piece: list[bytes] = []
    size, start = 0, 1
    for number, line in _lines(handle):
        place = RowLocation(path, number)
        if line is None:
            yield RowError(place, f"a line of more than {LONGEST >> 20} MiB")
            continue
        piece.append(line)
        size += len(line)
        if size >= _TEXT_PIECE:
            yield _document(piece, RowLocation(path, start))
            piece, size, start = [], 0, number + 1
    if any(line.strip() for line in piece):
        yield _document(piece, RowLocation(path, start))


READERS: dict[str, FileReader] = {
    ".jsonl": read_lines, ".ndjson": read_lines, ".json": read_json, ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet, ".txt": read_text, ".text": read_text,
}  # fmt: skip
"""Readers by suffix."""


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """`(number, line)`; None for one that is too long, which is passed over."""
    number = 0
    while line := handle.readline(LONGEST):
        number += 1
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (rest := handle.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line


def _parsed(line: bytes, place: RowLocation) -> Row | RowError:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(place, f"not UTF-8 ({error.reason}). Convert the file to UTF-8.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError(
            place, f"not valid JSON: {_reason(error)}. Each line must be one JSON object."
        )
    return _row(value, place)


def _row(value: Any, place: RowLocation) -> Row | RowError:
    if isinstance(value, dict):
        return Row(place, value)
    return RowError(
        place,
        f"a {type(value).__name__} instead of a JSON object with messages, prompt and completion, "
        "or text.",
    )


def _document(lines: list[bytes], place: RowLocation) -> Row | RowError:
    try:
        return Row(place, {"text": b"".join(lines).decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        line = place.line + error.object[: error.start].count(b"\n")
        return RowError(
            RowLocation(place.file, line), f"not UTF-8 ({error.reason}). Convert the file to UTF-8."
        )


def _array(handle: io.BufferedReader, path: str) -> Iterator[Row | RowError]:
    """The elements of a JSON array, read piece by piece."""
    with io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape") as text:
        yield from _elements(text, path)


def _elements(text: io.TextIOWrapper, path: str) -> Iterator[Row | RowError]:
    decoder, size = json.JSONDecoder(), 1 << 16
    before, _, buffer = text.read(size).partition("[")
    line = 1 + before.count("\n")
    while True:
        rest = buffer.lstrip(" \t\r\n,")
        line += buffer[: len(buffer) - len(rest)].count("\n")
        buffer, place = rest, RowLocation(path, line)
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError) as error:
            more = (
                ""
                if isinstance(error, RecursionError) or len(buffer) > LONGEST
                else text.read(size)
            )
            if not more:
                yield RowError(place, f"not valid JSON from here on: {_reason(error)}.")
                return
            buffer, size = (
                buffer + more,
                size * 2,
            )  # twice as much each time, so that a long element costs no square
            continue
        line += buffer.count("\n", 0, end)
        yield (
            _row(value, place)
            if is_text(buffer[:end])
            else RowError(place, "not UTF-8. Convert the file to UTF-8.")
        )
        buffer, size = buffer[end:], 1 << 16


def is_text(value: str) -> bool:
    """Whether a string can be written in UTF-8: it has no half of a surrogate pair."""
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


def _whole(data: bytes, path: str) -> Iterator[Row | RowError]:
    """A file that is one object: its rows are those of the one list of objects it holds, or it
    is a row itself.
    """
    if len(data) > LONGEST:
        yield RowError(
            RowLocation(path, 1),
            f"one JSON object of more than {LONGEST >> 20} MiB. Write an array, or an object a "
            "line.",
        )
        return
    parsed = _parsed(
        data.replace(b"\xef\xbb\xbf", b"", 1) if data.startswith(b"\xef\xbb\xbf") else data,
        RowLocation(path, 1),
    )
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
