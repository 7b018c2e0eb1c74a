"""Evaluation of whole models: against transformers, and the same numbers however it is computed."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxtune import api
from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.evaluation.evaluate import EvalOptions, evaluate
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import write_adapter
from jaxtune.weights.source import resolve
from jaxtune.workflows.evaluate import evaluate_model
from tests.support import tools
from tests.support.adapters import with_adapter
from tests.support.cases import thinned

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(0)
    words = ["red", "green", "blue", "a long one", "x"]
    choices = [
        {
            "question": f"{n}?" * (1 + n % 4),
            "choices": words[: 2 + n % 4],
            "answer": int(random.integers(0, 2 + n % 4)),
        }
        for n in range(11)
    ]
    return {
        "classification": tools.write_rows(
            folder / "classes.jsonl",
            [tools.chat("?" * (n % 7 + 1), words[n % 3]) for n in range(13)],
        ),
        "qa": tools.write_rows(
            folder / "qa.jsonl", [tools.chat("+" * (n % 5 + 1), f"{n}") for n in range(9)]
        ),
        "choice": tools.write_rows(folder / "choice.jsonl", choices),
        "lm": tools.write_rows(
            folder / "lm.jsonl", [tools.chat("?" * (n + 1), "w " * (3 + 2 * n)) for n in range(9)]
        ),
        "generation": tools.write_rows(
            folder / "long.jsonl",
            [tools.chat("?" * (n % 3 + 1), json.dumps({"n": n})) for n in range(5)],
        ),
    }


def found(chat_model, path, task="auto", batch=32, devices=1):
    source, mesh = resolve(str(chat_model)), make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        asked = EvalOptions(task, batch, max_new_tokens=8)
        return evaluate(
            load_model(source, mesh),
            source.tokenizer(),
            source.stop_ids(),
            DataSection(eval=path),
            asked,
        )


@pytest.mark.parametrize(
    "task", thinned(["classification", "qa", "choice", "lm", "generation"], "classification", "lm")
)
def test_no_batch_size_and_no_mesh_changes_a_number(chat_model, files, task):
    reference = found(chat_model, files[task], task)
    figures = reference.as_dict()
    for batch, devices in ((1, 1), (3, 1), (4, 8)):
        other = found(chat_model, files[task], task, batch, devices)
        theirs = other.as_dict()
        assert theirs.keys() == figures.keys()
        for name, value in figures.items():
            if isinstance(value, float):
                assert theirs[name] == pytest.approx(value, rel=1e-5), name
        for name, metric in reference.metrics.items():
            np.testing.assert_array_equal(other.metrics[name].rows, metric.rows)
        assert [row.get("said") for row in other.predictions] == [
            row.get("said") for row in reference.predictions
        ]


def test_the_loss_is_weighted_by_tokens(chat_model, files):
    """Rows of 3 to 19 words: a mean of rows' means, or of batches', is another number."""
    tokenizer = resolve(str(chat_model)).tokenizer()
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    losses, tokens = [], []
    for line in Path(files["lm"]).read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)[
            "input_ids"
        ]
        whole = [
            *prompt,
            *tokenizer(messages[1]["content"] + "<|im_end|>", add_special_tokens=False)[
                "input_ids"
            ],
        ]
        logs = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        answer = whole[len(prompt) :]
        losses.append(
            -sum(logs[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))
        )
        tokens.append(len(answer))
    result = found(chat_model, files["lm"], "lm").as_dict()
    assert result["loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
    assert result["supervised_tokens"] == sum(tokens)
    assert abs(result["loss"] - np.mean(np.divide(losses, tokens))) > 1e-3
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))
    low, high = result["intervals"]["perplexity"]
    assert low < result["perplexity"] < high


def test_choices_are_scored_as_by_transformers(chat_model, files):
    tokenizer = resolve(str(chat_model)).tokenizer()
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    result = found(chat_model, files["choice"])
    assert result.task == "choice"
    plain, by_length = [], []
    for line, prediction in zip(
        Path(files["choice"]).read_text().splitlines(), result.predictions, strict=True
    ):
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True
        )["input_ids"]
        scores = []
        for text in row["choices"]:
            answer = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
            logs = torch.log_softmax(model(torch.tensor([[*prompt, *answer]])).logits[0], -1)
            scores.append(
                sum(logs[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))
            )
        np.testing.assert_allclose(prediction["log_probs"], scores, atol=1e-3)
        plain.append(int(np.argmax(scores)) == row["answer"])
        by_length.append(
            int(np.argmax(np.divide(scores, list(map(len, row["choices"]))))) == row["answer"]
        )
    assert result.metrics["accuracy"].value == pytest.approx(np.mean(plain))
    assert result.metrics["accuracy_norm"].value == pytest.approx(np.mean(by_length))


def test_generated_answers_are_those_of_transformers(chat_model, files):
    tokenizer = resolve(str(chat_model)).tokenizer()
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    for row in found(chat_model, files["qa"]).predictions:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        assert row["said"] == tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def adapter(chat_model, one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(
        folder,
        with_adapter(chat_model, one_device, ["q_proj", "down_proj"], rank=4, alpha=32.0),
        str(chat_model),
    )
    return folder


@pytest.mark.parametrize("task", thinned(["classification", "qa"], "qa"))
def test_before_and_after_in_one_call(chat_model, adapter, files, task, monkeypatch):
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)
    result = evaluate_model(
        str(chat_model),
        files[task],
        str(adapter),
        options=EvalOptions(batch=4),
        base=True,
    )
    both, rows = result.metrics, result.predictions
    alone = api.evaluate(str(chat_model), files[task], str(adapter))
    before = api.evaluate(str(chat_model), files[task])
    for name in ("loss", *both["comparison"]):
        assert both[name] == pytest.approx(alone[name], rel=1e-5)
        assert both["base"][name] == pytest.approx(before[name], rel=1e-5)
        assert both["comparison"][name]["difference"] == pytest.approx(
            alone[name] - before[name], abs=1e-5
        )
    assert 0 < both["comparison"]["loss"]["p_value"] <= 1
    assert abs(both["comparison"]["loss"]["difference"]) > 1e-3
    assert all("said" in row["base"] for row in rows)


def test_a_model_against_itself_does_not_differ(chat_model, files, monkeypatch):
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)
    other = api.evaluate(str(chat_model), files["qa"], against=str(chat_model))
    assert other["comparison"]["loss"] == {"difference": 0, "interval": [0, 0], "p_value": 1}


def test_what_cannot_be_compared_is_refused(chat_model, files, monkeypatch):
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)
    with pytest.raises(UserError, match="has no adapter"):
        api.evaluate(str(chat_model), files["qa"], base=True)
    with pytest.raises(UserError, match="Keep one of them"):
        api.evaluate(str(chat_model), files["qa"], base=True, against=str(chat_model))
    with pytest.raises(UserError, match="unknown; there are auto, lm"):
        api.evaluate(str(chat_model), files["qa"], task="quiz")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(chat_model, files, tmp_path):
    """Each has two devices and all rows; answers are generated together, and the lead alone
    prints and writes.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    arguments = ["eval", str(chat_model), "--data", files["qa"], "--batch-size", "4"]
    begun = []
    for number in range(2):
        environment = tools.child_environment() | {
            "JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number),
        }  # fmt: skip
        more = [
            "--json",
            str(tmp_path / f"{number}.json"),
            "--predictions",
            str(tmp_path / f"{number}.jsonl"),
        ]
        command = [sys.executable, "-m", "jaxtune", *arguments, *more]
        begun.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    said = [process.communicate(timeout=300) for process in begun]
    assert [process.returncode for process in begun] == [0, 0], said
    assert "loss" not in said[1][0]
    assert not (tmp_path / "1.json").exists()
    one = tools.jaxtune(
        *arguments, "--json", tmp_path / "one.json", "--predictions", tmp_path / "one.jsonl"
    )
    assert one.returncode == 0, one.stderr
    both, alone = (json.loads((tmp_path / name).read_text()) for name in ("0.json", "one.json"))
    assert both.pop("intervals").keys() == alone.pop("intervals").keys()
    assert both.pop("task") == alone.pop("task")
    assert both == pytest.approx(alone, rel=1e-5)
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
