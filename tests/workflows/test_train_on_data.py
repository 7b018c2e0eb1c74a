"""Runs on other data than a file of chats: a split, texts, chats for a base model, bad rows left
out, a template that prints the date.
"""

import json

import jax
import pytest

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.config.schema import DataSection
from jaxtune.core.mesh import make_mesh
from jaxtune.evaluation.evaluate import EvalOptions, evaluate
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.tracking.ownership import write_marker
from jaxtune.tracking.progress import Reporter
from jaxtune.training import setup
from jaxtune.weights import export
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from jaxtune.workflows.train import run
from tests.support import tools

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def train(tmp_path, monkeypatch, chat_model):
    """Trains two steps on one device; the run."""
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr(export, "why_not_torch", lambda source, *packages: "not the subject here")
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)

    def call(*keys, model=chat_model):
        common = [
            f"model.source={model}",
            f"run.dir={tmp_path / 'run'}",
            "data.max_length=64",
            "train.batch_size=2",
            "train.steps=2",
        ]
        return run(load_config(overrides=[*common, *keys]), Reporter(quiet=True))

    return call


def test_a_split_is_evaluated_on(train, tmp_path):
    rows = [tools.chat(f"{n}+{n}?", str(2 * n)) for n in range(40)]
    result = train(
        f"data.train={tools.write_rows(tmp_path / 'rows.jsonl', rows)}",
        "data.split=20%",
        "train.eval_every=1",
    )
    data = json.loads((result.dir / "data.json").read_text())
    assert data["train"]["rows"] + data["eval"]["rows"] == 40
    assert result.before["rows"] == data["eval"]["rows"] > 2
    on_the_way = [row for row in read_metrics(result.dir) if row["split"] == "eval"]
    assert len(on_the_way) == 3
    prompts = {
        row["prompt"][0]["content"]
        for row in map(json.loads, (result.dir / "samples.jsonl").read_text().splitlines())
    }
    assert prompts <= {row["messages"][0]["content"] for row in rows}
    assert "evaluated on 20%" in (result.adapter / "README.md").read_text()


def test_texts_train_as_they_are_and_are_continued(train, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one two three four " * 40)
    (folder / "b.txt").write_text("five six seven")
    result = train(f"data.train={folder}", f"data.eval={folder / 'a.txt'}", "data.packing=false")
    data = json.loads((result.dir / "data.json").read_text())["train"]
    assert (data["format"], data["rows"], data["examples"]) == ("text", 2, 13)
    assert data["supervised_tokens"] == 760 + 14  # each byte but the first of a text, and its EOS
    assert result.before["task"] == "lm"
    assert result.before["supervised_tokens"] == 760
    (sample,) = map(json.loads, (result.dir / "samples.jsonl").read_text().splitlines())
    assert sample["prompt"][0]["content"] == ("one two three four " * 40)[:200]
    on_texts = jaxtune.evaluate(str(result.dir), str(folder / "a.txt"))
    assert on_texts["loss"] == pytest.approx(result.after["loss"], rel=1e-5)


def test_chats_for_a_base_model_bring_their_template_along(train, tmp_path):
    base = tools.save_model(
        tmp_path / "base", tools.tiny_config(), tools.byte_tokenizer(None, "</s>", add_bos=True)
    )
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(12))
    result = train(f"data.train={rows}", f"data.eval={rows}", model=base)
    _, words = jaxtune.load(str(result.dir))
    text = words.apply_chat_template(
        tools.sums(1)[0]["messages"][:1], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<s>### User:\n")
    assert text.endswith("\n\n### Assistant:\n")
    untrained = jaxtune.evaluate(
        str(base), rows
    )  # without an adapter the same rows give what was measured before training
    assert untrained["loss"] == pytest.approx(result.before["loss"], rel=1e-5)
    assert jaxtune.evaluate(str(result.dir), rows)["loss"] == pytest.approx(
        result.after["loss"], rel=1e-5
    )
    assert jaxtune.generate(str(result.dir), ["1+1?"], max_new_tokens=4) == jaxtune.generate(
        str(result.dir), [[{"role": "user", "content": "1+1?"}]], max_new_tokens=4
    )


def test_columns_and_rows_left_out(train, tmp_path):
    rows = [{"question": f"{n}?", "answers": {"text": [str(n)]}} for n in range(8)]
    path = tools.write_rows(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"question": "?"}\n{\n')
    keys = [f"data.train={path}", "data.columns={prompt: question, completion: answers.text.0}"]
    with pytest.raises(
        jaxtune.core.errors.UserError,
        match=r"rows.jsonl:9: the column 'answers.text.0' of data.columns is missing",
    ):
        train(*keys)
    result = train(*keys, "data.on_error=skip")
    data = json.loads((result.dir / "data.json").read_text())["train"]
    assert (data["rows"], data["bad"]) == (8, 2)
    answers = [
        row["wanted"]
        for row in map(json.loads, (result.dir / "samples.jsonl").read_text().splitlines())
    ]
    assert answers == ["0", "1", "2", "3", "4"]
    other = tools.write_rows(tmp_path / "other.jsonl", rows[:3])
    assert (
        jaxtune.evaluate(str(result.dir), other, task="lm")["rows"] == 3
    )  # read with the run's columns


def test_a_run_that_goes_on_another_day_sees_the_same_date(train, tmp_path):
    template = (
        "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + tools.CHATML
    )
    model = tools.save_model(
        tmp_path / "dated", tools.tiny_config(), tools.byte_tokenizer(template)
    )
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(8))
    (tmp_path / "run").mkdir()
    write_marker(tmp_path / "run", "run", {"day": "2024-02-09"})
    keys = [f"data.train={rows}", "checkpoint.every=1"]
    first = train(*keys, model=model)
    assert json.loads((first.dir / "env.json").read_text())["day"] == "2024-02-09"
    assert (
        train(*keys, model=model).metrics == first.metrics
    )  # today's date would have been refused as other data


def test_chats_are_evaluated_whole_and_texts_in_windows_of_the_length_they_were_trained_in(
    chat_model, tmp_path, one_device
):
    model, words = load_model(resolve(str(chat_model)), one_device), tools.byte_tokenizer()
    chats = tools.write_rows(tmp_path / "chats.jsonl", tools.sums(6))
    texts = tools.write_rows(tmp_path / "texts.jsonl", [{"text": "once upon a time " * 4}])
    metrics = {
        (name, length): evaluate(
            model, words, [257], DataSection(eval=path, max_length=length), EvalOptions("lm")
        ).as_dict()
        for name, path in (("chats", chats), ("texts", texts))
        for length in (16, 200)
    }
    assert metrics["chats", 16] == metrics["chats", 200]
    assert metrics["texts", 16]["supervised_tokens"] == metrics["texts", 200]["supervised_tokens"]
    assert abs(metrics["texts", 16]["loss"] - metrics["texts", 200]["loss"]) > 1e-3
