"""Whatever the rows, each supervised token is trained once an epoch or its row is named."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError
from jaxtune.data.chat.tokenize import ConversationTokenizer
from jaxtune.data.formats.registry import read_conversation
from jaxtune.data.loader import BatchSchedule
from jaxtune.data.packing import Layout
from jaxtune.data.prepare import prepare
from jaxtune.data.sources.row import Row, RowError, RowLocation
from tests.support import tools
from tests.support.chat_families import FAMILIES, tokenizer

WORDS = tools.byte_tokenizer()
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

text = st.text(st.characters(codec="utf-8"), max_size=30)
turns = st.lists(st.tuples(text, text, st.sampled_from([None, 0, 0.5, 1])), max_size=4)


def chat(pairs, question):
    messages = []
    for asked, answer, weight in pairs:
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer, "weight": weight},
        ]
    return {
        "messages": [
            *messages,
            *(
                [{"role": "user", "content": question}]
                if question is not None or not messages
                else []
            ),
        ]
    }


chats = st.builds(chat, turns, st.none() | text).map(
    lambda row: {
        "messages": [
            {k: v or "" if k == "content" else v for k, v in message.items()}
            for message in row["messages"]
        ]
    }
)
texts = st.builds(
    lambda value: {"text": value}, st.text(st.characters(codec="utf-8"), max_size=120)
)


def segments(batch):
    """The examples in a batch: tokens fed, targets, weights, positions."""
    for row in range(len(batch.segment_ids)):
        numbers = batch.segment_ids[row]
        for number in range(1, numbers.max() + 1):
            at = np.flatnonzero(numbers == number)
            assert (np.diff(at) == 1).all()
            yield tuple(
                tuple(part[row, at].tolist())
                for part in (batch.input_ids, batch.target_ids, batch.weights, batch.positions)
            )


def expected_segments(rows, max_length, train_on):
    """What each row must come out as, from its tokens alone: segments, and whether supervised
    tokens are lost to the cut.
    """
    expected, lost, nothing = Counter(), set(), set()
    for number, value in enumerate(rows, 1):
        row = read_conversation(Row(RowLocation("", number), value))
        ((document,),) = ConversationTokenizer(WORDS, train_on)([row])
        ids, weights = document.ids, document.example().weights
        step = max_length if row.text else len(ids)
        for start in range(0, max(len(ids) - 1, 1), step):
            part = slice(start, start + max_length + 1)
            supervised = np.flatnonzero(weights[part][1:])
            if len(supervised):
                size = supervised[-1] + 1
                of = ids[part]
                expected[
                    tuple(of[:size]),
                    tuple(of[1 : size + 1]),
                    tuple(weights[part][1 : size + 1]),
                    tuple(range(size)),
                ] += 1
            else:
                nothing.add(number)
        if not row.text and weights[max_length + 1 :].any():
            lost.add(number)
    return expected, lost, nothing


@FUZZ
@given(
    rows=st.lists(chats, min_size=1, max_size=12) | st.lists(texts, min_size=1, max_size=8),
    max_length=st.integers(2, 120),
    batch_size=st.integers(1, 4),
    packing=st.booleans(),
    shuffle=st.booleans(),
    train_on=st.sampled_from(["responses", "last"]),
)
@example(
    rows=[{"text": "x" * 40}],
    max_length=8,
    batch_size=1,
    packing=True,
    shuffle=False,
    train_on="responses",
)
def test_every_supervised_token_is_trained_once_or_its_row_is_named(
    rows, max_length, batch_size, packing, shuffle, train_on
):
    expected, lost, nothing = expected_segments(rows, max_length, train_on)
    with tempfile.TemporaryDirectory() as folder:
        path = tools.write_rows(Path(folder) / "rows.jsonl", rows)
        data = DataSection(train=path, max_length=max_length, train_on=train_on)
        if not expected:
            with pytest.raises(UserError, match="no row has a supervised token"):
                prepare(data, WORDS)
            return
        examples = prepare(data, WORDS)
        schedule = BatchSchedule(
            examples, Layout(batch_size, max_length, packing, shuffle, 1), epochs=2
        )
        half = len(schedule.epoch_schedule(0))
        for part in (range(half), range(half, len(schedule))):
            assert (
                Counter(segment for index in part for segment in segments(schedule.batch(index)))
                == expected
            )
        for index in range(len(schedule)):
            assert schedule.tokens(index) == np.count_nonzero(schedule.batch(index).segment_ids)
        named = {
            name: {int(place.rpartition(":")[2]) for place in getattr(examples, name)}
            for name in ("truncated", "cut_off", "unanswered")
        }
        assert named["truncated"] == lost
        assert named["cut_off"] | named["unanswered"] == nothing
        assert named["cut_off"] == nothing & lost
        assert examples.summary()["supervised_tokens"] == sum(
            count * np.count_nonzero(segment[2]) for segment, count in expected.items()
        )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    [
        "messages",
        "role",
        "content",
        "prompt",
        "completion",
        "text",
        "tools",
        "weight",
        "tool_calls",
        "conversations",
        "from",
        "value",
    ]
)
odd = st.dictionaries(
    keys,
    json_values | st.lists(st.dictionaries(keys, json_values, max_size=3), max_size=3),
    max_size=4,
)
lines = st.one_of(
    chats.map(lambda value: json.dumps(value).encode()),
    odd.map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda role, content: json.dumps(
            {"messages": [{"role": role, "content": content}]}
        ).encode(),
        st.sampled_from(["user", "assistant", "tool", "x"]),
        json_values,
    ),
    st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from(
        [
            b"",
            b"   ",
            b"\x00\x00\x00",
            b"null",
            b"[]",
            b"{}",
            b"\xff\xfe{",
            b'{"messages"',
            b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
            b'{"messages": [{"role": "assistant", "content": "\xe9"}]}',
            b'{"messages": [{"role": "assistant", "content": "a\\u0000b"}]}',
            b"[" * 100_000,
            b'{"messages":' * 5000,
            b'{"n": ' + b"9" * 5000 + b"}",
            b'{"messages": [{"role": "assistant", "content": "' + b"y" * 5000 + b'"}]}',
            b'{"messages": [{"role": "user", "content": ""}, '
            b'{"role": "assistant", "content": ""}]}',
            json.dumps(
                {
                    "messages": [{"role": "user", "content": "x"}],
                    "tools": [json.loads("[" * 400 + "]" * 400)],
                }
            ).encode(),
        ]
    ),
)


@settings(FUZZ, max_examples=150)
@given(
    file=st.lists(lines, min_size=1, max_size=10), train_on=st.sampled_from(["responses", "all"])
)
def test_whatever_a_file_holds_each_row_is_trained_or_named(file, train_on):
    good = {
        "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join([json.dumps(good).encode(), *file]))
        rows = {
            number for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()
        }
        data = DataSection(train=str(path), max_length=64, on_error="skip", train_on=train_on)
        examples = prepare(data, WORDS)
        bad = [int(message.removeprefix(f"{path}:").partition(":")[0]) for message in examples.bad]
        ((store, _),) = examples.stores
        kept = store.documents["line"].tolist()
        assert sorted(bad + kept) == sorted(rows)
        assert 1 in kept
        named = {
            int(location.rpartition(":")[2])
            for locations in (examples.cut_off, examples.unanswered)
            for location in locations
        }
        assert len(examples.items) + len(named) == len(kept)
        strict = data.model_copy(update={"on_error": "raise"})
        if not bad:
            assert len(prepare(strict, WORDS).items) == len(examples.items)
            return
        with pytest.raises(UserError) as caught:
            prepare(strict, WORDS)
        assert f"rows.jsonl:{bad[0]}: " in str(caught.value)
        assert "\n" not in str(caught.value)


@settings(FUZZ, max_examples=40)
@given(
    data=st.binary(max_size=300),
    name=st.sampled_from(
        ["x.json", "x.csv", "x.tsv", "x.parquet", "x.txt", "x.jsonl.gz", "x.jsonl.zst", "x.csv.zip"]
    ),
)
@example(data=b"\x00" * 50, name="x.csv")
@example(data=b'a,b\n"', name="x.csv")
@example(data=b"a,b\n1,2,3\n\xff,2\n1,2", name="x.csv")
@example(data=b'[{"text": "a"}, 3, {"text": "\xff"}, {"text": "b"}', name="x.json")
@example(data=b'{"text": ', name="x.json")
def test_files_of_any_bytes_end_in_rows_or_one_clear_error(data, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        for on_error in ("skip", "raise"):
            try:
                prepare(DataSection(train=str(path), on_error=on_error), WORDS)
            except UserError as error:
                assert name in str(error)  # noqa: PT017 (it may also end well)


def test_a_row_of_a_million_tokens_and_a_line_beyond_the_limit(tmp_path, monkeypatch):
    from jaxtune.data.sources import readers

    path = tmp_path / "rows.jsonl"
    rows = [
        tools.chat("x" * 1_000_000, "yes"),
        tools.chat("1+1?", "y" * 1_000_000),
        tools.chat("1+1?", "2"),
    ]
    tools.write_rows(path, rows)
    examples = prepare(DataSection(train=str(path), max_length=100), WORDS)
    assert [list(locations) for locations in (examples.cut_off, examples.truncated)] == [
        [f"{path}:1"],
        [f"{path}:1", f"{path}:2"],
    ]
    assert examples.lengths.tolist()[0] == 100
    monkeypatch.setattr(readers, "LONGEST", 500_000)
    path.write_bytes(path.read_bytes() + b" \n")
    examples = prepare(DataSection(train=str(path), max_length=100, on_error="skip"), WORDS)
    assert len(examples.items) == 1
    assert [message.partition(": ")[0] for message in examples.bad] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_rows_that_the_template_rewrites_are_counted_once(name, tmp_path):
    messages = [
        {"role": role, "content": content}
        for role, content in (
            ("system", "Add."),
            ("user", "1"),
            ("assistant", "2"),
            ("user", "3"),
            ("assistant", "4"),
        )
    ]
    path = tools.write_rows(tmp_path / "rows.jsonl", [{"messages": messages}] * 3)
    examples = prepare(DataSection(train=path), tokenizer(FAMILIES[name], "bytes"))
    assert (examples.rows, len(examples.items), examples.rewritten) == (3, 6, 3)


def test_bad_rows_are_errors_of_their_own_kind():
    assert issubclass(RowError, UserError)
