"""lm-evaluation-harness with our class and with its own `hf` class, on tasks made from local
files.
"""

import json
import sys

import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from jaxtune.core.errors import UserError
from jaxtune.evaluation.harness import HarnessModel, run_tasks
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from jaxtune.workflows.evaluate import run_harness
from tests.support import tools

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore::ResourceWarning",
        "ignore::UserWarning",
    ),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def task(folder, name, rows, **keys):
    tools.write_rows(folder / f"{name}.jsonl", rows)
    body = {
        "task": name, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test", **keys,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))
    return name


def make_tasks(folder):
    """Multiple choice, rolling perplexity and generate_until."""
    random = np.random.default_rng(0)
    words = ["apple", "stone", "river water", "to run very fast", "blue"]
    questions = [
        {
            "q": "Which? " * (1 + n % 5),
            "choices": words[: 2 + n % 4],
            "gold": int(random.integers(0, 2 + n % 4)),
        }
        for n in range(9)
    ]
    documents = [{"text": " ".join(words * (1 + 9 * (n % 4)))} for n in range(5)]
    prompts = [{"q": "+".join("12345"[: 1 + n % 5]), "a": str(n)} for n in range(6)]
    return [
        task(
            folder,
            "local_choice",
            questions,
            output_type="multiple_choice",
            doc_to_text="{{q}}\nAnswer:",
            doc_to_choice="{{choices}}",
            doc_to_target="{{gold}}",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        task(
            folder,
            "local_rolling",
            documents,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[
                {"metric": "word_perplexity"},
                {"metric": "byte_perplexity"},
                {"metric": "bits_per_byte"},
            ],
        ),
        task(
            folder,
            "local_generation",
            prompts,
            output_type="generate_until",
            doc_to_text="{{q}}=",
            doc_to_target="{{a}}",
            generation_kwargs={"until": ["e", "\n\n"], "max_gen_toks": 20},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]


def samples(lm, tasks, folder):
    found = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0
    )
    figures = {
        name: {key: value for key, value in values.items() if isinstance(value, float)}
        for name, values in found["results"].items()
    }
    return figures, {name: [row["resps"] for row in found["samples"][name]] for name in tasks}


@pytest.fixture(scope="module")
def ours(chat_model, one_device):
    source = resolve(str(chat_model))
    return HarnessModel(
        load_model(source, one_device), source.tokenizer(), source.stop_ids(), batch=4
    )


@pytest.mark.slow
def test_equal_to_the_harness_own_model(ours, chat_model, tmp_path):
    """Also for contexts longer than the model, cut on the left, and texts of several windows."""
    tasks = make_tasks(tmp_path)
    theirs = HFLM(
        pretrained=str(chat_model), dtype="float32", device="cpu", batch_size=3, max_length=160
    )
    ours.max_length = 160
    figures, found = samples(ours, tasks, tmp_path)
    reference, expected = samples(theirs, tasks, tmp_path)
    for name in tasks:
        assert figures[name] == pytest.approx(reference[name], rel=1e-4)
        for mine, other in zip(found[name], expected[name], strict=True):
            if name == "local_generation":
                assert mine == other
            elif name == "local_rolling":
                assert np.ravel(mine) == pytest.approx(np.ravel(other), abs=1e-3)
            else:
                for (score, greedy), (score2, greedy2) in zip(
                    (r[0] for r in mine), (r[0] for r in other), strict=True
                ):
                    assert (float(score), str(greedy)) == (
                        pytest.approx(float(score2), abs=1e-3),
                        str(greedy2),
                    )
    assert len({str(answer) for answer in found["local_generation"]}) > 1


def test_chats_go_through_the_models_own_template(ours):
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat) == ours.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_one_bos(tmp_path, one_device):
    """The tokenizer adds one to what has none, and a text that brings its own gets no second."""
    path = tools.save_model(
        tmp_path, tools.tiny_config(), tools.byte_tokenizer(tools.LLAMA3, add_bos=True)
    )
    source = resolve(str(path))
    lm = HarnessModel(load_model(source, one_device), source.tokenizer(), source.stop_ids())
    bos = lm.tokenizer.bos_token_id
    assert lm.tok_encode("hello").count(bos) == 1
    assert (
        lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": "hi"}])).count(bos) == 1
    )


def test_from_the_command_line(chat_model, tmp_path):
    (name, *_) = make_tasks(tmp_path)
    arguments = [
        "--harness",
        name,
        "--include-path",
        tmp_path,
        "--limit",
        5,
        "--num-fewshot",
        0,
        "--json",
        tmp_path / "out.json",
    ]
    done = tools.jaxtune("eval", chat_model, *arguments, torch=True)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())["model"]
    assert result["n-samples"][name]["effective"] == 5
    assert 0 <= result["results"][name]["acc,none"] <= 1


def test_what_is_not_there_is_refused(ours, chat_model, monkeypatch):
    with pytest.raises(UserError, match="no task no_such_task"):
        run_tasks(ours, ["no_such_task"])
    with pytest.raises(UserError, match="num_beams"):
        ours._generation_settings({"num_beams": 4})
    monkeypatch.delitem(sys.modules, "jaxtune.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'jaxtune\[harness\]'"):
        run_harness(str(chat_model), ["any"])
