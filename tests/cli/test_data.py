"""`jaxtune data`: what will be trained on, and what looks wrong with it."""

import json
import re

import numpy as np
import pytest

from jaxtune.cli.main import main
from jaxtune.data.inspect import length_histogram
from tests.support import tools

ROWS = [
    tools.chat(f"{a}+{b}?", "odd" if (a + b) % 2 else "even") for a in range(5) for b in range(6)
]


@pytest.fixture
def data(chat_model, tmp_path, capsys):
    """Runs the command on rows; its exit status, screen, errors and JSON."""

    def call(rows, *extra, model=chat_model, held_out=None):
        path = rows if isinstance(rows, str) else tools.write_rows(tmp_path / "rows.jsonl", rows)
        keys = [
            f"data.train={path}",
            f"run.dir={tmp_path / 'run'}",
            "data.max_length=128",
            "train.batch_size=2",
        ]
        keys += (
            [f"data.eval={tools.write_rows(tmp_path / 'held-out.jsonl', held_out)}"]
            if held_out
            else []
        )
        code = main(
            ["data", "--model", str(model), *keys, "--json", str(tmp_path / "data.json"), *extra]
        )
        out = capsys.readouterr()
        summary = (
            json.loads((tmp_path / "data.json").read_text())
            if (tmp_path / "data.json").exists()
            else None
        )
        assert not (tmp_path / "run").exists()
        return code, out.out, out.err, summary

    return call


def test_the_screen_and_the_json(data):
    code, screen, _, summary = data(ROWS, "--rows", "2", held_out=[tools.chat("what?", "odd")])
    assert code == 0
    part = summary["parts"]["train"]
    assert (part["rows"], part["examples"], part["duplicates"], part["format"]) == (
        30,
        30,
        0,
        "messages",
    )
    assert sum(part["lengths"]["counts"]) == 30
    assert part["supervised_tokens"] == sum(len(row["messages"][1]["content"]) + 1 for row in ROWS)
    assert part["supervised_share"] == pytest.approx(
        part["supervised_tokens"] / part["tokens"], abs=1e-4
    )
    assert part["packing_efficiency"] == pytest.approx(
        part["tokens"] / (part["batches"] * 2 * 128), abs=0.1
    )
    assert summary["classes"] == [["even", 15], ["odd", 15]]
    assert summary["warnings"] == []
    assert "Nothing looks wrong." in screen
    assert "30 read, 30 examples, 0 truncated, 0 left out" in screen
    assert screen.count("⟦") == 2 + 2  # each example says what they mean
    assert "⟦even<|im_end|>⟧" in screen
    assert "0+0?<|im_end|>" in screen
    bars = re.findall(r"(\d+) to +(\d+) +[█▏▎▍▌▋▊▉]+ (\d+)", screen)
    assert sum(int(count) for _, _, count in bars) == 31
    assert "Evaluation data" in screen


def test_what_looks_wrong_is_said(data):
    rows = [*ROWS, ROWS[0], ROWS[1], tools.chat("q" * 200, "lost"), tools.chat("q" * 60, "y" * 100)]
    rows.append({"messages": [{"role": "user", "content": "no answer"}]})
    held_out = [
        ROWS[3],
        tools.chat(ROWS[4]["messages"][0]["content"], "neither"),
        tools.chat("new", "odd"),
    ]
    _, screen, _, summary = data(rows, held_out=held_out)
    part = summary["parts"]["train"]
    assert (part["duplicates"], part["truncated"], part["dropped"], part["bad"]) == (2, 2, 2, 0)
    assert [
        re.sub(".*rows.jsonl:", "", place) for place in part["places"]["truncated"]["first"]
    ] == ["33", "34"]
    assert [
        re.sub(".*rows.jsonl:", "", place)
        for place in part["places"]["cut_off"]["first"] + part["places"]["unanswered"]["first"]
    ] == [
        "33",
        "35",
    ]
    assert summary["overlap"] == {"rows": 1, "prompts": 1}
    for expected in (
        "the answers of 2 of 35 rows are cut off", "2 rows are left out",
        "2 rows repeat an earlier one", "1 evaluation rows are also trained on",
        "1 evaluation rows have a prompt that is trained on with another answer",
    ):  # fmt: skip
        assert any(expected in line for line in summary["warnings"]), expected
        assert expected in screen.replace("\n", " ")


def test_imbalance_and_rows_that_are_all_too_long(data):
    rows = [tools.chat(f"{n}?", "yes" if n % 8 else "no") for n in range(64)]
    assert any("56 rows answer 'yes', 8 answer 'no'" in line for line in data(rows)[3]["warnings"])
    rows = [tools.chat(f"{n}?", "y" * 300) for n in range(3)]
    assert any(
        "every row is longer than data.max_length" in line for line in data(rows)[3]["warnings"]
    )


def test_bad_rows_are_all_listed_and_then_refused_unless_skipped(data, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        "\n".join([json.dumps(ROWS[0]), "{", json.dumps({"messages": 3}), json.dumps(ROWS[1])])
        + "\n"
    )
    code, screen, err, summary = data(str(path))
    assert code == 2
    assert "2 bad rows: training stops at the first" in err
    assert "bad.jsonl:2: not valid JSON" in screen
    assert "bad.jsonl:3: 'messages' is not a list" in screen
    assert summary["parts"]["train"]["places"]["bad"]["count"] == 2
    code, _, err, summary = data(str(path), "data.on_error=skip")
    assert code == 0
    assert summary["warnings"] == ["train: 2 bad rows are left out."]


@pytest.mark.parametrize(
    ("template", "eos", "keys", "expected"),
    [
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "</s>",
            [],
            "the end of turn is not supervised",
        ),
        (
            "{{ bos_token }}" + tools.LLAMA3,
            "<|eot_id|>",
            ["data.train_on=all"],
            "30 examples begin with BOS twice",
        ),
    ],
)
def test_templates_that_look_wrong(template, eos, keys, expected, data, tmp_path):
    model = tools.save_model(
        tmp_path / "model", tools.tiny_config(), tools.byte_tokenizer(template, eos)
    )
    assert any(expected in line for line in data(ROWS, *keys, model=model)[3]["warnings"])


def test_histogram():
    lengths = np.array([1, 10, 11, 95, 96, 120])
    histogram = length_histogram(lengths)
    assert histogram == {
        "edges": list(range(0, 121, 10)),
        "counts": [2, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1],
    }
    for values in ([1], [5, 5], [1, 1_000_000], [128, 128, 4096]):
        histogram = length_histogram(np.array(values))
        assert sum(histogram["counts"]) == len(values)
        assert len(histogram["counts"]) <= 13
        assert histogram["edges"][0] < min(values)
        assert histogram["edges"][-1] >= max(values)
