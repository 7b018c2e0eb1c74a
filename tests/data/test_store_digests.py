"""Cached tokens that were changed on disk are made anew, and are their user's alone."""

import json

import numpy as np
import pytest

from jaxtune.config.schema import DataSection
from jaxtune.data import block_digests, store
from jaxtune.data.prepare import prepare
from tests.support import tools

WORDS = tools.byte_tokenizer(None, "</s>")
ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(300)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(store.VERIFY_ALL, raising=False)
    monkeypatch.setattr(block_digests, "_BLOCK_BYTES", 256)
    return DataSection(train=tools.write_rows(tmp_path / "rows.jsonl", ROWS), max_length=64)


def tokens(data):
    return [row.ids.tolist() for row in prepare(data, WORDS).items]


def cached():
    (path,) = store.cache_directory().iterdir()
    return path


def change(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("name", ["ids", "documents", "spans"])
@pytest.mark.parametrize("at", [0, -1])
def test_a_changed_store_is_made_anew(name, at, data):
    expected, path = tokens(data), cached() / name
    whole = path.read_bytes()
    change(path, at % len(whole))
    assert tokens(data) == expected
    assert path.read_bytes() == whole


def test_a_sample_is_compared_or_on_demand_all(data, monkeypatch):
    expected, path = tokens(data), cached() / "ids"
    whole = path.read_bytes()
    assert len(whole) // 256 > 60
    change(path, len(whole) // 2)
    monkeypatch.setattr(
        block_digests.random, "sample", lambda numbers, count: list(numbers)[:count]
    )
    assert store.open_store(cached()) is not None  # the middle is not in this sample
    monkeypatch.setenv(store.VERIFY_ALL, "1")
    assert store.open_store(cached()) is None
    assert tokens(data) == expected
    assert path.read_bytes() == whole


def test_the_cache_is_private(data):
    tokens(data)
    assert store.cache_directory().stat().st_mode & 0o777 == 0o700
    assert cached().stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in cached().iterdir()} == {0o600}


def test_digests_are_those_of_the_blocks(data):
    """By another implementation."""
    import hashlib

    tokens(data)
    digests = json.loads((cached() / "manifest.json").read_text())["blocks"]["ids"]
    ids = np.fromfile(cached() / "ids", np.uint8)
    parts = np.split(ids, range(256, len(ids), 256))
    assert digests == [
        hashlib.blake2b(part.tobytes(), digest_size=16).hexdigest() for part in parts
    ]
