"""Parquet: rows a few at a time, whatever they are when unpacked."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxtune.data.sources.row import LONGEST, Row, RowError, RowLocation

_BATCH = 256


def read_parquet(handle: BinaryIO, path: str) -> Iterator[Row | RowError]:
    """Read Parquet, rows numbered from 1."""
    import pyarrow

    number = 0
    try:
        with _seekable(handle) as file:
            for batch in _batches(file):
                # A row at a time where they are large: equal cells are stored once.
                step = batch.num_rows if batch.nbytes <= LONGEST else 1
                for begin in range(0, batch.num_rows, step or 1):
                    part = batch.slice(begin, step)
                    if part.nbytes > LONGEST:
                        number += 1
                        location = RowLocation(path, number)
                        yield RowError(location, f"a row of more than {LONGEST >> 20} MiB")
                        continue
                    for value in part.to_pylist():
                        number += 1
                        yield Row(RowLocation(path, number), value)
    except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as error:
        yield RowError(
            RowLocation(path, number + 1),
            f"not a whole Parquet file from here on: {str(error).splitlines()[0]}",
        )


def _batches(file: BinaryIO) -> Iterator[Any]:
    """Yield the rows of a Parquet file, fewer at a time the longer its cells may be: a dictionary
    of a few long ones may stand for millions.
    """
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as parquet:
        for group in range(parquet.metadata.num_row_groups):
            details = parquet.metadata.row_group(group)
            columns = (details.column(number) for number in range(details.num_columns))
            repeated = [
                column.total_uncompressed_size
                for column in columns
                if any("DICTIONARY" in encoding for encoding in column.encodings)
            ]
            rows = (4 * LONGEST) // max(1, sum(repeated))
            yield from parquet.iter_batches(max(1, min(_BATCH, rows)), row_groups=[group])


def _seekable(handle: BinaryIO) -> Any:
    """Return a file that can be read from its end, a copy on disk of one that cannot."""
    if handle.seekable():
        return contextlib.nullcontext(handle)
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(handle, copy)
    copy.seek(0)
    return copy
