"""Every kind of source gives the same rows, each with the place it stands at."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxtune.config.schema import DataSection, DataSource
from jaxtune.core.errors import UserError
from jaxtune.data.prepare import prepare, read_conversations
from jaxtune.data.sources.row import RowError
from jaxtune.data.sources.source import EVAL, TRAIN, open_source
from tests.support import tools
from tests.support.hub import Hub, serve

ROWS = [{"prompt": f"what, is; {n}?\n", "completion": f'"{n}" é 🙂'} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table(separator, newline="\n"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, ["prompt", "completion"], delimiter=separator, lineterminator=newline
    )
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet():
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer, row_group_size=2)
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return buffer.getvalue()


FILES = {
    "rows.jsonl": LINES,
    "windows.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"),
    "no-newline.ndjson": LINES.rstrip(b"\n"),
    "lines.json": LINES,
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "within.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "rows.csv": table(","),
    "excel.csv": b"\xef\xbb\xbf" + table(";", "\r\n"),
    "rows.tsv": table("\t"),
    "rows.parquet": parquet(),
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.bz2": bz2.compress(LINES),
    "rows.jsonl.xz": lzma.compress(LINES),
    "rows.jsonl.zst": zstandard.compress(LINES),
    "rows.jsonl.zip": zipped(),
    "rows.csv.gz": gzip.compress(table(",")),
    "rows.parquet.gz": gzip.compress(parquet()),
}


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def read(source, part=TRAIN, **settings):
    return list(open_source(DataSource(source=str(source), **settings), part).rows())


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(name, folder):
    rows = read(folder / name)
    assert [row.value for row in rows] == ROWS
    assert all(row.location.file == str(folder / name) for row in rows)
    assert [row.value for row in read(folder / name, rows=2)] == ROWS[:2]


def test_places_are_lines(folder):
    def lines(name):
        return [row.location.line for row in read(folder / name)]

    assert lines("rows.jsonl") == [1, 2, 3, 4, 5]
    assert lines("windows.jsonl") == [1, 3, 5, 7, 9]
    assert lines("pretty.json") == [2, 6, 10, 14, 18]
    assert lines("rows.csv") == [2, 4, 6, 8, 10]  # each prompt ends with a line break
    assert lines("rows.parquet") == [1, 2, 3, 4, 5]


def test_directories_and_globs(tmp_path):
    for name, part in (("b.jsonl", ROWS[3:]), ("a.jsonl", ROWS[:2]), ("sub/c.jsonl.gz", ROWS[2:3])):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row) + "\n" for row in part).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for name in ("README.md", ".hidden.jsonl", "_cache/x.jsonl", "notes.txt", "dataset_info.json"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    (tmp_path / "set" / "bb.jsonl").write_text("\n")  # an empty part harms nothing
    assert [row.value for row in read(tmp_path / "set")] == ROWS[:2] + ROWS[3:] + ROWS[2:3]
    assert [row.value for row in read(tmp_path / "set" / "*.jsonl")] == ROWS[:2] + ROWS[3:]
    assert [row.value for row in read(tmp_path / "set" / "**" / "[!.]*.gz")] == ROWS[2:3]
    with pytest.raises(UserError, match="no file matches"):
        read(tmp_path / "set" / "*.csv")


def test_urls(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, part in (("a.jsonl", ROWS[:3]), ("b.jsonl.gz", ROWS[3:])):
        data = "".join(json.dumps(row) + "\n" for row in part).encode()
        memory.pipe(f"/bucket/{name}", gzip.compress(data) if name.endswith("gz") else data)
    rows = read("memory://bucket/*")
    assert [row.value for row in rows] == ROWS
    assert str(rows[-1].location) == "memory:///bucket/b.jsonl.gz:2"
    before = open_source(DataSource(source="memory://bucket/a.jsonl"), TRAIN).identity()
    memory.pipe("/bucket/a.jsonl", b'{"text": "x"}\n')
    assert open_source(DataSource(source="memory://bucket/a.jsonl"), TRAIN).identity() != before
    assert [row.value for row in read(f"file://{folder}/rows.csv")] == ROWS
    for url in ("memory://bucket/none.jsonl", "memory://bucket/*.csv"):
        with pytest.raises(UserError, match="there is no such file"):
            read(url)
    with pytest.raises(UserError, match="nonsense"):
        read("nonsense://x.jsonl")


def test_splits_of_a_directory(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl", "validation.jsonl"):
        tools.write_rows(tmp_path / name, [{"text": name}])
    (tmp_path / "data" / "test").mkdir(parents=True)
    tools.write_rows(tmp_path / "data" / "test" / "0.jsonl", [{"text": "test"}])
    assert [row.value["text"] for row in read(tmp_path)] == [
        "train-00000.jsonl",
        "train-00001.jsonl",
    ]
    assert [row.value["text"] for row in read(tmp_path, EVAL)] == ["validation.jsonl"]
    assert [row.value["text"] for row in read(tmp_path, split="test")] == ["test"]
    with pytest.raises(
        UserError, match="no files of the split 'other'; there are test, train, validation"
    ):
        read(tmp_path, split="other")
    with pytest.raises(UserError, match="is a single file and has no split 'test'"):
        read(tmp_path / "validation.jsonl", split="test")


def test_text_files_are_documents_and_long_ones_are_cut_at_ends_of_lines(tmp_path):
    long = "".join(f"line {n}\n" for n in range(200_000))
    (tmp_path / "a.txt").write_text("one\n\ntwo é\n")
    (tmp_path / "b.txt").write_text(long)
    rows = read(tmp_path)
    assert rows[0].value == {"text": "one\n\ntwo é\n"}
    assert "".join(row.value["text"] for row in rows[1:]) == long
    assert len(rows) == 4
    assert all(
        row.value["text"].endswith("\n") and len(row.value["text"]) < 1.01 * 2**20
        for row in rows[1:]
    )
    assert long.split("\n")[rows[2].location.line - 1] == rows[2].value["text"].split("\n")[0]


def test_sets_that_datasets_saved(tmp_path):
    import datasets

    parts = {
        "train": datasets.Dataset.from_list(ROWS[:3]),
        "test": datasets.Dataset.from_list(ROWS[3:]),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    assert [row.value for row in read(tmp_path / "both")] == ROWS[:3]
    assert [row.value for row in read(tmp_path / "both", EVAL)] == ROWS[3:]
    assert [row.value for row in read(tmp_path / "one", rows=2)] == ROWS[:2]
    assert str(read(tmp_path / "both")[1].location) == f"{tmp_path / 'both'}[train]:2"
    with pytest.raises(UserError, match=r"has no split 'dev'. It has train, test"):
        read(tmp_path / "both", split="dev")


def test_what_is_no_source(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, expected in (
        ("rows.xlsx", "files of this kind are not read"),
        ("nowhere.jsonl", "is not a file"),
        ("empty", "has no data file"),
    ):
        with pytest.raises(UserError, match=expected):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"gs://nobody/rows.jsonl: .*install gcsfs"):
        read("gs://nobody/rows.jsonl")
    with pytest.raises(
        UserError, match=r"is neither a file here nor a data set that can be read from the hub"
    ):
        read("nobody/no-such-set")


@pytest.mark.parametrize(
    "name",
    [
        "rows.jsonl.gz",
        "rows.jsonl.xz",
        "rows.jsonl.zst",
        "rows.jsonl.bz2",
        "rows.jsonl.zip",
        "rows.parquet",
        "array.json",
    ],
)
def test_files_cut_short_are_said_to_be(name, folder):
    path = folder / name
    whole = path.read_bytes()
    for size in (1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        rows = read(path)
        assert isinstance(rows[-1], RowError), size
        assert str(path) in str(rows[-1])
        assert [row.value for row in rows[:-1]] == ROWS[: len(rows) - 1]


def rows_of(data, which):
    return [row.messages[-1]["content"] for row in read_conversations(data, which)]


def test_a_split_is_stable_and_keeps_equal_prompts_together(tmp_path):
    rows = [{"prompt": f"question {n % 300}", "completion": f"{n}"} for n in range(600)]
    data = DataSection(train=tools.write_rows(tmp_path / "rows.jsonl", rows), split="20%")
    train, held_out = rows_of(data, "train"), rows_of(data, "eval")
    assert sorted(train + held_out) == sorted(row["completion"] for row in rows)
    assert 80 < len(held_out) < 160
    assert not {int(n) % 300 for n in train} & {int(n) % 300 for n in held_out}
    more = rows + [{"prompt": f"new {n}", "completion": f"x{n}"} for n in range(300)]
    larger = DataSection(train=tools.write_rows(tmp_path / "more.jsonl", more[::-1]), split=0.2)
    assert set(held_out) < set(rows_of(larger, "eval"))
    assert set(train) < set(rows_of(larger, "train"))
    words = tools.byte_tokenizer(None, "</s>")
    assert len(prepare(data, words).items) == len(train)
    assert len(prepare(data, words, "eval").items) == len(held_out)
    with pytest.raises(UserError, match="leaves no row for eval"):
        prepare(
            DataSection(train=tools.write_rows(tmp_path / "two.jsonl", rows[:2]), split="1%"),
            words,
            "eval",
        )


def test_mixtures(tmp_path):
    paths = [
        tools.write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(6)])
        for name in "ab"
    ]
    data = DataSection(train=[paths[0], DataSource(source=paths[1], weight=0.5)], eval=[*paths])
    words = tools.byte_tokenizer(None, "</s>")
    examples = prepare(data, words)
    assert [(part.count, part.weight) for part in examples.shares] == [(6, 1.0), (6, 0.5)]
    assert [words.decode(item.ids) for item in examples.items[4:8]] == [
        "a4</s>",
        "a5</s>",
        "b0</s>",
        "b1</s>",
    ]
    assert examples.summary()["rows"] == 12
    assert rows_of(data, "eval") == [f"{name}{n}" for name in "ab" for n in range(6)]


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """From a stand-in for the hub: a data set of two splits in JSON Lines."""
    files = {"train.jsonl": LINES, "test.jsonl": LINES.split(b"\n")[0] + b"\n"}

    class Sets(Hub):
        """Data sets live below /datasets and /api/datasets."""

        def do_GET(self):
            self.path = self.path.replace("/datasets/", "/", 1).replace(
                "/api/datasets/", "/api/models/", 1
            )
            if self.path.startswith("/api/org"):
                self.path = self.path.replace("/api/", "/api/models/", 1)
            return Hub.do_GET(self)

        do_HEAD = do_GET

    monkeypatch.setattr(Hub, "files", {"org/model": files})
    code = (
        "from jaxtune.config.schema import DataSource\nfrom jaxtune.data.sources.source import "
        "open_source\nimport json, sys\n"
        "for settings in json.loads(sys.argv[1]):\n"
        "    source = open_source(DataSource(source='org/model', **settings), 'train')\n"
        "    print(json.dumps([source.name, [row.value for row in source.rows()]]))\n"
    )
    settings = json.dumps([{}, {"split": "test"}, {"rows": 2}])
    with serve(Sets) as address:
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
            "HF_DATASETS_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, settings],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == [
        ["org/model[train]", ROWS],
        ["org/model[test]", ROWS[:1]],
        ["org/model[train]", ROWS[:2]],
    ]
