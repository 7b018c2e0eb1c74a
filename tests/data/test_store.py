"""Tokenized data is kept by what it depends on, whole or not at all, whoever else is writing it."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError
from jaxtune.data import prepare as preparing
from jaxtune.data import store as stores
from jaxtune.data.chat.tokenize import ConversationTokenizer
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.prepare import prepare
from tests.support import tools

WORDS = tools.byte_tokenizer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def rows(tmp_path):
    return tools.write_rows(tmp_path / "rows.jsonl", tools.sums(40))


def count_fills(monkeypatch):
    """How often anything is tokenized anew."""
    calls = []
    fill = preparing._fill
    monkeypatch.setattr(preparing, "_fill", lambda *arguments: calls.append(1) or fill(*arguments))
    return calls


def content(examples):
    return [(item.ids.tolist(), item.weights.tolist()) for item in examples.items]


def test_the_second_time_nothing_is_tokenized_and_all_is_the_same(cache, rows, monkeypatch):
    calls = count_fills(monkeypatch)
    first, second = (prepare(DataSection(train=rows, max_length=60), WORDS) for _ in range(2))
    assert len(calls) == 1
    assert content(first) == content(second)
    assert first.summary() == second.summary()
    assert (
        prepare(DataSection(train=rows, max_length=30), WORDS).lengths.max()
        == 30
        < first.lengths.max()
    )
    assert len(calls) == 1  # a cut is made of the same tokens
    alone = [
        ConversationTokenizer(WORDS, "responses")([Conversation("", row["messages"])])[0][
            0
        ].example()
        for row in tools.sums(40)
    ]
    assert [ids[:61] for ids, _ in content(first)] == [
        example.ids.tolist()[:61] for example in alone
    ]


def test_many_chunks_keep_the_order_of_the_rows(cache, rows, monkeypatch):
    whole = content(prepare(DataSection(train=rows), WORDS))
    monkeypatch.setattr(preparing, "_CHUNK_ROWS", 3)
    monkeypatch.setenv("JAXTUNE_CACHE", str(cache / "other"))
    assert content(prepare(DataSection(train=rows), WORDS)) == whole


def test_whatever_the_tokens_depend_on_makes_them_anew(cache, rows, tmp_path, monkeypatch):
    calls = count_fills(monkeypatch)
    prepare(DataSection(train=rows), WORDS)
    other_words = tools.byte_tokenizer(tools.LLAMA3, "<|eot_id|>")
    for data, words in (
        (DataSection(train=rows, train_on="last"), WORDS),
        (DataSection(train=rows), other_words),
        (DataSection(train=rows), tools.byte_tokenizer(merges=[("1", "+")])),
        (DataSection(train=rows, columns={"tools": "{messages}"}), WORDS),
    ):
        before = len(calls)
        prepare(data, words)
        assert len(calls) == before + 1
    tools.write_rows(rows, tools.sums(41))
    before = len(calls)
    assert len(prepare(DataSection(train=rows), WORDS).items) == 41
    assert len(calls) == before + 1


def only(cache):
    (path,) = (path for path in cache.iterdir() if not path.name.startswith("."))
    return path


DAMAGES = {
    "cut short": lambda path: os.truncate(path / "ids", 8),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"version": 1, "counts"'),
    "another version": lambda path: (path / "manifest.json").write_text(
        json.dumps(json.loads((path / "manifest.json").read_text()) | {"version": 0})
    ),
    "a part is missing": lambda path: (path / "spans").unlink(),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
    "no directory": shutil.rmtree,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_whole_is_made_again(name, cache, rows):
    first = content(prepare(DataSection(train=rows), WORDS))
    DAMAGES[name](only(cache))
    assert content(prepare(DataSection(train=rows), WORDS)) == first
    assert [path.name for path in cache.iterdir()] == [only(cache).name]


def test_a_failure_on_the_way_leaves_nothing(cache, rows, monkeypatch):
    with open(rows, "a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"rows.jsonl:41: not valid JSON"):
        prepare(DataSection(train=rows), WORDS)
    assert list(cache.iterdir()) == []

    def full(self, name, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.Writer, "_write", full)
    with pytest.raises(
        UserError, match=r"No space left on device. Make room, or set JAXTUNE_CACHE"
    ):
        prepare(DataSection(train=rows, on_error="skip"), WORDS)
    assert list(cache.iterdir()) == []
    monkeypatch.setenv("JAXTUNE_CACHE", "/dev/null/nowhere")
    with pytest.raises(UserError, match="Set JAXTUNE_CACHE to a directory that can"):
        prepare(DataSection(train=rows, on_error="skip"), WORDS)


CHILD = """
import sys
from transformers import PreTrainedTokenizerFast
from jaxtune.config.schema import DataSection
from jaxtune.data.prepare import prepare
words = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
print(prepare(DataSection(train=sys.argv[1]), words).digest, flush=True)
"""


def child(rows, words):
    environment = tools.child_environment() | {"PYTHONPATH": "."}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, rows, words],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_killed_and_concurrent_runs_share_a_cache(cache, tmp_path, monkeypatch):
    """Processes that make the same store at once, some killed on the way: those that live agree,
    and one whole store is left.
    """
    rows = tools.write_rows(tmp_path / "many.jsonl", tools.sums(20_000))
    words = str(tmp_path / "words")
    WORDS.save_pretrained(words)
    killed, living = ([child(rows, words), child(rows, words)] for _ in range(2))
    deadline = time.monotonic() + 120
    while (
        not (cache.exists() and any(cache.glob(".unfinished.*/ids")))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    for process in killed:
        process.kill()
    digests = {process.communicate(timeout=300)[0] for process in living}
    for process in killed:
        process.communicate()
    assert all(process.returncode == 0 for process in living)
    assert digests == {prepare(DataSection(train=rows), WORDS).digest + "\n"}
    assert only(cache).is_dir()
    for path in cache.glob(".unfinished.*"):  # a day later they are gone
        for file in path.iterdir():
            os.utime(file, (0, 0))
    monkeypatch.setattr(stores, "_MOST_BYTES", 0)  # and what was used longest ago makes room
    prepare(DataSection(train=tools.write_rows(tmp_path / "few.jsonl", tools.sums(3))), WORDS)
    assert len(list(cache.iterdir())) == 1


def test_digests_are_those_that_old_runs_have_written_down(cache, rows, tmp_path):
    """A run goes on only with the data it began with, which it knows by this digest."""
    assert prepare(DataSection(train=rows), WORDS).digest == (
        "697c40893ae51fda7344bea75dad57be:40:780"
    )
    pairs = [
        {"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no" * (n + 1)} for n in range(6)
    ]
    path = tools.write_rows(tmp_path / "pairs.jsonl", pairs)
    assert prepare(DataSection(train=path), WORDS, comparison="pairs").digest == (
        "03d4ebb994005f9f05e56e4792c997d7:12:66:pairs"
    )


def test_threads_too(cache, rows):
    contents = []
    threads = [
        threading.Thread(
            target=lambda: contents.append(content(prepare(DataSection(train=rows), WORDS)))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(contents) == 6
    assert all(each == contents[0] for each in contents)


def test_marks_and_places(cache, tmp_path):
    twice = tools.byte_tokenizer("{{ bos_token }}" + tools.LLAMA3, "<|eot_id|>")
    bare = tools.byte_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "</s>"
    )
    path = tools.write_rows(tmp_path / "rows.jsonl", [tools.chat("1", "2"), tools.chat("3", "4")])
    for words, mark in ((twice, stores.TWO_BOS), (bare, stores.NOT_ENDED)):
        ((store, _),) = prepare(
            DataSection(train=path, train_on="all" if words is twice else "responses"), words
        ).stores
        assert np.all(store.documents["marks"] & mark), mark
    ((store, _),) = prepare(DataSection(train=path), WORDS).stores
    assert not store.documents["marks"].any()
    assert [str(store.location(number)) for number in range(2)] == [f"{path}:1", f"{path}:2"]
