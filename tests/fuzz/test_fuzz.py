"""Damaged and hostile files end in a result or in a message for the user, never in another error,
and never hang. Seeded: case n is the same everywhere.

JAXTUNE_FUZZ_CASES says how many cases each kind of file gets, JAXTUNE_FUZZ_FIRST the first of them;
`scripts/test --fuzz MINUTES` goes on to further ones.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import struct
import traceback
from pathlib import Path

import pytest
import yaml

from jaxtune.config.load import dump, load_config, load_sweep
from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError
from jaxtune.data.prepare import prepare
from jaxtune.report.page import write_report
from jaxtune.weights.safetensors_files import open_file
from jaxtune.weights.tokenizer_files import load_tokenizer
from tests.support import tools

CASES = int(os.environ.get("JAXTUNE_FUZZ_CASES", "20"))
FIRST = int(os.environ.get("JAXTUNE_FUZZ_FIRST", "0"))
FIXTURES = Path(__file__).parents[1] / "fixtures" / "layout-0"
SECONDS = 20
WORDS = tools.byte_tokenizer(None, "</s>")
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, 1e308, "", "x", "\0",
    "\x1b[2J", "\ud800", "../../etc/passwd", "<script>alert(1)</script>", "a" * 10_000, [], [None],
    [[]], {}, {"a": {"b": []}}, [1] * 300,
]  # fmt: skip
BITS = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b'"',
    b"\n",
    b"\r",
    b",",
    b"&a ",
    b"*a",
    b"!!",
    b"\x1f\x8b",
]


@contextlib.contextmanager
def at_most(seconds):
    """Raise in the block that takes longer."""

    def ring(*_):
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(data, chance):
    """Some bytes of a file changed, moved, doubled or gone."""
    for _ in range(chance.randint(1, 4)):
        begin = chance.randrange(len(data) + 1)
        end = min(len(data), begin + chance.choice([0, 1, 1, 2, 8, 64]))
        insert = chance.choice(
            [chance.choice(BITS), data[end : end + 50], bytes([chance.randrange(256)])]
        )
        data = data[:begin] + insert * chance.choice([1, 1, 1, 100]) + data[end:]
    return data[: chance.randrange(len(data) + 1)] if chance.random() < 0.15 else data


def places(value, path=()):
    """The paths of all fields in a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from places(item, (*path, key))


def altered(value, chance):
    """A value of JSON with some fields of another type, gone, or under another name."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(list(places(value)))
        if not path:
            continue
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if chance.random() < 0.2:
            del inner[path[-1]]
        elif chance.random() < 0.2 and isinstance(inner, dict):
            inner[chance.choice(["x", "", "__class__", "\ud800"])] = inner.pop(path[-1])
        else:
            inner[path[-1]] = copy.deepcopy(chance.choice(VALUES))
    return value


def as_json(text, chance):
    """A file of JSON, damaged in its values or in its bytes; a line of one where it has several."""
    if chance.random() < 0.3:
        return damaged(text.encode(), chance)
    lines = text.splitlines() if "\n{" in text.strip() and text[0] == "{" else [text]
    number = chance.randrange(len(lines))
    with contextlib.suppress(ValueError):
        lines[number] = json.dumps(altered(json.loads(lines[number]), chance))
    return "\n".join(lines).encode()


def check(act, number, what):
    try:
        with at_most(SECONDS), contextlib.suppress(UserError):
            act()
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-4:])
        pytest.fail(f"case {number} of {what}: {type(error).__name__}\n{text}", pytrace=False)


def cases(what):
    for number in range(FIRST, FIRST + CASES):
        yield number, random.Random(f"{what} {number}")


@pytest.mark.slow
def test_run_directories(tmp_path):
    names = ["metrics.jsonl", "env.json", "data.json", "verification.json", "samples.jsonl"]
    names += ["predictions.jsonl", "config.yaml"]
    for number, chance in cases("run"):
        run = shutil.copytree(FIXTURES / "finished", tmp_path / f"{number}")
        for name in chance.sample(names, chance.randint(1, 3)):
            text = (run / name).read_text()
            (run / name).write_bytes(as_json(text, chance))
        check(lambda run=run: write_report([run, run], run / "out.html"), number, "run")


def test_data_files(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    conversation = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    rows = [conversation, {"prompt": "p", "completion": "c"}, {"text": "t"}] * 3
    lines = "\n".join(map(json.dumps, rows))
    table = "prompt,completion\n" + 'a,"b,c"\n' * 9
    for number, chance in cases("data"):
        kind = chance.choice(["jsonl", "json", "csv", "tsv", "txt"])
        texts = {"json": json.dumps(rows), "csv": table, "tsv": table.replace(",", "\t")}
        text = texts.get(kind, lines)
        data = as_json(text, chance) if kind.startswith("json") else damaged(text.encode(), chance)
        packing = chance.choice(["", "", ".gz", ".zst", ".xz", ".bz2", ".zip"])
        path = tmp_path / f"{number}.{kind}{packing}"
        path.write_bytes(damaged(packed(data, packing), chance) if packing else data)
        section = DataSection(train=str(path), max_length=64, on_error="skip")
        check(lambda section=section: prepare(section, WORDS), number, "data")


def packed(data, suffix):
    import bz2
    import gzip
    import io
    import lzma
    import zipfile

    import zstandard

    if suffix == ".zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("rows.jsonl", data)
        return buffer.getvalue()
    packers = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstandard}
    return packers[suffix].compress(data) if suffix else data


def test_configurations(tmp_path):
    text = dump(load_config())
    for number, chance in cases("configuration"):
        if chance.random() < 0.5:
            data = damaged(text.encode(), chance)
        else:
            tree = altered(yaml.safe_load(text), chance)
            data = json.dumps(tree).encode()
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(data)
        check(lambda path=path: load_config(path), number, "configuration")
        check(lambda path=path: load_sweep(path), number, "configuration")


def test_tokenizers(chat_model, tmp_path):
    for number, chance in cases("tokenizer"):
        model = shutil.copytree(chat_model, tmp_path / f"{number}")
        for name in chance.sample(
            ["tokenizer.json", "tokenizer_config.json"], chance.randint(1, 2)
        ):
            (model / name).write_bytes(as_json((model / name).read_text(), chance))
        check(lambda model=model: load_tokenizer(model), number, "tokenizer")


def test_headers_of_safetensors(chat_model, tmp_path):
    whole = (chat_model / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    for number, chance in cases("safetensors"):
        if chance.random() < 0.4:
            content = damaged(whole[: 8 + size], chance) + data
        else:
            text = json.dumps(altered(header, chance)).encode()
            content = struct.pack("<Q", len(text)) + text + data
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)

        def act(path=path):
            for tensor in open_file(path).values():
                tensor.all()

        check(act, number, "safetensors")
        path.unlink()
