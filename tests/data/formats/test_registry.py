"""The formats, each as its users write it."""

import json
from typing import get_args

import pytest

from jaxtune.config.schema import DataSection
from jaxtune.data.formats.preference import read_pair
from jaxtune.data.formats.registry import data_formats, detect_format, read_conversation
from jaxtune.data.prepare import read_conversations
from jaxtune.data.sources.row import Row, RowError, RowLocation
from tests.support import tools

U, A, S = (
    {"role": role, "content": text}
    for role, text in (("user", "1+1?"), ("assistant", "2"), ("system", "Add."))
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
FORMATS = {
    "messages": ({"messages": [S, U, A]}, "messages", [S, U, A]),
    "messages with nulls, as Parquet has them": (
        {"messages": [{**U, "name": None, "tool_calls": None}, {**A, "weight": None}]},
        "messages",
        [U, A],
    ),
    "content in parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}],
                },
                A,
            ]
        },
        "messages",
        [U, A],
    ),
    "calls of tools with arguments as text": (
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
            ]
        },
        "messages",
        [U, {"role": "assistant", "tool_calls": [CALL], "content": ""}],
    ),
    "weights": ({"messages": [U, A | {"weight": 0}]}, "messages", [U, A | {"weight": 0.0}]),
    "prompt and completion": ({"prompt": "1+1?", "completion": "2"}, "prompt-completion", [U, A]),
    "prompt and completion as messages": (
        {"prompt": [S, U], "completion": [A]},
        "prompt-completion",
        [S, U, A],
    ),
    "alpaca": ({"instruction": "1+1?", "input": "", "output": "2"}, "alpaca", [U, A]),
    "alpaca with an input": (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        "alpaca",
        [{"role": "user", "content": "Add.\n\n1 1"}, A],
    ),
    "alpaca with a system and a history": (
        {"instruction": "1+1?", "output": "2", "system": "Add.", "history": [["0?", "0"]]},
        "alpaca",
        [S, {"role": "user", "content": "0?"}, {"role": "assistant", "content": "0"}, U, A],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Add."},
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "2"},
            ]
        },
        "sharegpt",
        [S, U, A],
    ),
    "sharegpt with a system beside": (
        {
            "system": "Add.",
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "2", "weight": 2},
            ],
        },
        "sharegpt",
        [S, U, A | {"weight": 2.0}],
    ),
    "conversations with roles": ({"conversations": [U, A]}, "sharegpt", [U, A]),
    "text": ({"text": "Once."}, "text", [{"role": "assistant", "content": "Once."}]),
}


def row(value):
    return Row(RowLocation("rows.jsonl", 3), value)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_found_and_read(name):
    value, kind, messages = FORMATS[name]
    assert detect_format(value, {}) == kind
    for data_format in ("auto", kind):
        read = read_conversation(row(value), data_format)
        assert read.messages == messages
        assert (read.plain, read.text) == (name == "prompt and completion", name == "text")


def test_each_name_of_the_schema_is_a_format_of_its_own_module():
    names = get_args(DataSection.model_fields["format"].annotation)
    assert list(data_formats()) == [name for name in names if name != "auto"]
    assert all(format.name == name for name, format in data_formats().items())


AMBIGUOUS = {
    "preference": [{"prompt", "chosen", "rejected"}, {"messages", "chosen", "rejected"}],
    "choice": [{"prompt", "choices", "answer"}, {"question", "choices", "text"}],
    "messages": [{"messages", "prompt", "choices"}, {"messages", "conversations", "text"}],
    "sharegpt": [{"conversations", "prompt", "completion"}, {"conversation", "text"}],
    "prompt-completion": [
        {"prompt", "completion", "question", "choices"},
        {"prompt", "instruction", "output", "text"},
    ],
    "alpaca": [{"instruction", "output", "text"}],
    "text": [{"text", "question", "answer"}, {"text", "choices"}],
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_keys_of_several_formats_are_one_format(name):
    for keys in AMBIGUOUS[name]:
        assert detect_format(dict.fromkeys(keys), {}) == name, keys
        renamed = dict.fromkeys(f"my_{key}" for key in keys)
        assert detect_format(renamed, {key: f"my_{key}" for key in keys}) == name, keys


BAD = {
    "no known key": ({"question": "x", "answer": "y"}, "auto", "Say which columns hold what"),
    "a role in capitals": (
        {"messages": [U | {"role": "User"}]},
        "auto",
        "messages[0]: unknown role 'User'",
    ),
    "a role that is a list": (
        {"messages": [U | {"role": ["user"]}]},
        "auto",
        "unknown role ['user']",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "auto",
        "parts that are not text",
    ),
    "null content": (
        {"messages": [U, {"role": "assistant", "content": None}]},
        "auto",
        "messages[1]: 'content' is not a string",
    ),
    "arguments that are not JSON": (
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "add", "arguments": "{"}}],
                },
            ]
        },
        "auto",
        "the tool call 'add' are not valid JSON",
    ),
    "calls that are a number": (
        {"messages": [A | {"tool_calls": 3}]},
        "auto",
        "'tool_calls' is not a list",
    ),
    "tools that are a number": (
        {"messages": [A], "tools": 3},
        "auto",
        "'tools' is not a list of objects",
    ),
    "tools that are not JSON": (
        {"messages": [A], "tools": "{"},
        "auto",
        "'tools' is not valid JSON",
    ),
    "a negative weight": (
        {"messages": [A | {"weight": -1}]},
        "auto",
        "'weight' is -1, not a number from 0 on",
    ),
    "a weight that is true": ({"messages": [A | {"weight": True}]}, "auto", "'weight' is True"),
    "completion null": (
        {"prompt": "x", "completion": None},
        "auto",
        "'completion' is of type NoneType, not a string",
    ),
    "a speaker nobody knows": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "auto",
        "unknown speaker 'narrator'",
    ),
    "a speaker that is a list": (
        {"conversations": [{"from": [], "value": "x"}]},
        "auto",
        "unknown speaker []",
    ),
    "a turn without words": (
        {"conversations": [{"from": "gpt"}]},
        "auto",
        "conversations[0]: not an object with 'from'",
    ),
    "a history that is a text": (
        {"instruction": "x", "output": "y", "history": "z"},
        "auto",
        "'history' is not a list of pairs",
    ),
    "a text that is a list": ({"text": ["x"]}, "auto", "'text' is of type list"),
    "a question without choices": (
        {"question": "x", "answer": 0},
        "choice",
        "the key 'choices' is missing",
    ),
    "preferences": (
        {"prompt": "x", "chosen": "y", "rejected": "z"},
        "auto",
        "data.columns={completion: chosen}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_say_where_and_what(name):
    value, kind, expected = BAD[name]
    with pytest.raises(RowError) as caught:
        read_conversation(row(value), kind)
    assert str(caught.value).startswith("rows.jsonl:3: ")
    assert expected in str(caught.value)


def test_columns():
    value = {
        "question": "1+1?",
        "answers": {"text": ["2", "two"]},
        "why": {"a": 1},
        "n.b": "dotted",
    }

    def answer(column):
        return read_conversation(
            row(value), columns={"prompt": "question", "completion": column}
        ).answer

    assert answer("answers.text.1") == "two"
    assert answer("{answers.text.0} because {why}") == '2 because {"a": 1}'
    assert answer("n.b") == "dotted"
    for column, expected in (
        ("answer", "Did you mean 'answers'"),
        ("answers.text.2", "is missing"),
        ("{nothing}", "is missing"),
    ):
        with pytest.raises(RowError, match=expected):
            answer(column)
    with pytest.raises(RowError, match="'completion' is of type list"):
        answer("answers.text")


def test_a_prompt_needs_no_completion_to_be_asked():
    assert read_conversation(row({"prompt": "1+1?"}), answered=False).messages == [U]
    assert read_conversation(row({"instruction": "1+1?"}), "alpaca", answered=False).messages == [U]
    with pytest.raises(RowError, match="'completion' is missing"):
        read_conversation(row({"prompt": "1+1?"}))


def test_preferences():
    texts = read_pair(row({"prompt": "1+1?", "chosen": "2", "rejected": "3"}))
    chats = read_pair(row({"chosen": [U, A], "rejected": [U, A | {"content": "3"}]}))
    both = read_pair(row({"prompt": [U], "chosen": [A], "rejected": [A | {"content": "3"}]}))
    assert [[part.messages for part in pair] for pair in (texts, chats, both)] == [
        [[U, A], [U, A | {"content": "3"}]]
    ] * 3
    with pytest.raises(RowError, match="do not answer the same prompt"):
        read_pair(row({"chosen": [U, A], "rejected": [S, U, A]}))
    with pytest.raises(RowError, match="the key 'rejected' is missing"):
        read_pair(row({"prompt": "x", "chosen": "y"}))


def test_the_first_row_says_what_all_rows_of_a_source_are(tmp_path):
    path = tools.write_rows(
        tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two", "messages": [U, A]}]
    )
    assert [each.text for each in read_conversations(DataSection(train=path), "train")] == [
        True,
        True,
    ]


def test_digests_tell_rows_and_prompts_apart():
    def digests(*messages, **more):
        return read_conversation(row({"messages": list(messages), **more})).digests()

    right, wrong = digests(U, A), digests(U, A | {"content": "3"})
    assert right == digests(dict(reversed(U.items())), A)
    assert right[1] == wrong[1]
    assert right[0] != wrong[0]
    assert right[2] != wrong[2]
    assert digests(S, U, A)[1] != right[1]
    assert digests(U, A)[1] != digests({"role": "user", "content": "1+1?\0"}, A)[1]
    text = read_conversation(row({"text": "x"})).digests()
    assert text[0] == text[1]
    json.dumps(text)
