"""A file that is cut short, packed into another, or made to fill the memory is read whole, or named
in one line.
"""

import bz2
import gzip
import io
import json
import lzma
import resource
import tracemalloc
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxtune.config.schema import DataSource
from jaxtune.core.errors import UserError
from jaxtune.data.sources import opening, readers, row
from jaxtune.data.sources.row import RowError
from jaxtune.data.sources.source import TRAIN, open_source

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}" * 20} for n in range(200)]
LINES = "".join(json.dumps(item) + "\n" for item in ROWS).encode()
PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zst": zstandard.compress,
}


def read(path, **settings):
    return list(open_source(DataSource(source=str(path), **settings), TRAIN).rows())


def values(rows):
    return [item.value for item in rows if not isinstance(item, RowError)]


def errors(rows):
    return [str(item) for item in rows if isinstance(item, RowError)]


@pytest.mark.parametrize("kind", PACK)
def test_all_parts_of_a_packed_file_are_read(kind, tmp_path):
    """And a second part that is cut short, or damaged at its beginning, is named."""
    path, half = tmp_path / f"rows.jsonl.{kind}", LINES.index(b"\n", len(LINES) // 2) + 1
    first, second = PACK[kind](LINES[:half]), PACK[kind](LINES[half:])
    path.write_bytes(first + second)
    assert values(read(path)) == ROWS
    for damaged in (second[: len(second) // 2], second[:-1], b"XX" + second[2:]):
        path.write_bytes(first + damaged)
        rows = read(path)
        (message,) = errors(rows[-1:])
        assert message.startswith(f"{path}")
        assert values(rows) == ROWS[: len(rows) - 1]


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_no_packed_file_ends_silently(kind, share, tmp_path):
    path, whole = tmp_path / f"rows.jsonl.{kind}", PACK[kind](LINES)
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    assert errors(read(path)[-1:])


def test_every_data_file_of_an_archive_is_read(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("part")
        archive.writestr("part/a.jsonl", LINES)
        archive.writestr("b.json", json.dumps(ROWS[:3]))
        archive.writestr("c.csv.gz", gzip.compress(b"prompt,completion\nx,y\n"))
        archive.writestr("README.md", "not data")
        archive.writestr("__MACOSX/a.jsonl", "not data")
    rows = read(path)
    assert not errors(rows)
    assert values(rows)[: len(ROWS) + 3] == ROWS + ROWS[:3]
    assert str(rows[1].location) == f"{path}/part/a.jsonl:2"


def test_an_archive_without_data_is_named(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.md", "not data")
    (message,) = errors(read(path))
    assert "no data file in it" in message


def test_every_array_of_a_file_is_read_and_what_is_none_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:5], indent=1) + "\n")
    assert values(read(path)) == ROWS[:5]
    path.write_text(json.dumps(ROWS[:2]) + '\n{"prompt": "x"}')
    rows = read(path)
    assert values(rows) == ROWS[:2]
    assert "after this array comes" in errors(rows)[0]


def test_a_quote_that_is_not_closed_does_not_swallow_the_rest(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\nc,"d\ne,f\ng,h\n')
    rows = read(path)
    assert values(rows) == [{"prompt": "a", "completion": "b"}]
    assert errors(rows) == [f"{path}:3: not valid CSV: unexpected end of data"]


@pytest.mark.parametrize("kind", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "rows.txt"])
def test_what_unpacks_to_too_much_is_named(kind, name, tmp_path, monkeypatch):
    """One endless line, in little memory."""
    for module in (readers, row):
        monkeypatch.setattr(module, "LONGEST", 1 << 20)
    monkeypatch.setattr(opening, "_SMALL", 1 << 23)
    monkeypatch.setattr(opening, "_MOST_TIMES", 10)
    beginning = {"rows.csv": b'prompt,completion\n"', "rows.json": b'[{"prompt": "'}.get(name, b"")
    path = tmp_path / f"{name}.{kind}"
    path.write_bytes(PACK[kind](beginning + b"a" * (1 << 25)))
    tracemalloc.start()
    rows = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert errors(rows[-1:])
    assert str(path) in errors(rows)[-1]
    assert peak < 40 << 20


def test_a_row_of_millions_of_values_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": [' + "[]," * 5_000_000 + "[]]}\n" + '{"text": "b"}\n')
    rows = read(path)
    assert values(rows) == [{"text": "a"}, {"text": "b"}]
    assert errors(rows) == [f"{path}:2: more than 4,194,304 values in a row"]


def test_cells_that_parquet_stores_once_do_not_fill_the_memory(tmp_path, monkeypatch):
    """A file of some kilobytes with 10,000 cells of a mebibyte each."""
    from jaxtune.data.sources import parquet

    monkeypatch.setattr(parquet, "LONGEST", 4 << 20)
    cells = pyarrow.DictionaryArray.from_arrays([0] * 10_000, ["a" * (1 << 20)])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": cells}), path)
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 0
    for item in open_source(DataSource(source=str(path), rows=500), TRAIN).rows():
        count += len(item.value["text"]) == 1 << 20
    assert count == 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB
    monkeypatch.setattr(parquet, "LONGEST", 1 << 19)
    assert "a row of more than" in errors(read(path, rows=1))[0]


def test_parquet_within_what_cannot_seek(tmp_path):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    (tmp_path / "rows.parquet.zst").write_bytes(zstandard.compress(buffer.getvalue()))
    assert values(read(tmp_path / "rows.parquet.zst")) == ROWS


def test_a_saved_set_that_is_cut_short_is_named(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="saved"):
        read(tmp_path / "saved")
