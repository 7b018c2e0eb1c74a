"""Answers end where those that were trained on ended, in every program and after every export."""

import json
import shutil

import jax
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.mesh import make_mesh
from jaxtune.data.chat.answers import end_of_answer
from jaxtune.inference.chat import ChatModel
from jaxtune.inference.sampling import Sampling
from jaxtune.tracking.progress import Reporter
from jaxtune.training import setup
from jaxtune.weights.source import resolve
from jaxtune.workflows.generate import generate_completions
from jaxtune.workflows.load import open_model, open_with_base
from jaxtune.workflows.train import run
from tests.support import chat_families, talker, tools

pytestmark = pytest.mark.usefixtures("quick_compilation")

STOPS = [talker.EOS, talker.END]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Train so little that the model still says what it said."""
    directory = tmp_path_factory.mktemp("stops")
    rows = tools.write_rows(directory / "rows.jsonl", [tools.chat("well?", talker.ANSWER)] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
        patch.setattr("jaxtune.core.runtime.start", lambda *_: None)

        def call(model, name, *keys):
            common = [
                f"model.source={model}", f"run.dir={directory / name}", f"data.train={rows}",
                f"data.eval={rows}", "data.max_length=64", "train.batch_size=4", "train.steps=1",
                "optimizer.learning_rate=1e-9", "adapter.rank=2", "train.eval_task=generation",
            ]  # fmt: skip
            return run(load_config(overrides=[*common, *keys]), Reporter(quiet=True))

        yield call


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(talker.save(tmp_path_factory.mktemp("base") / "talker"))


@pytest.fixture(scope="module")
def tuned(train, base):
    return train(base, "adapter")


def said(model, **options):
    (answer,) = generate_completions(
        str(model), ["well?"], max_new_tokens=12, **options
    ).completions
    return answer.text, answer.end


def stops_in(directory):
    return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]


def test_a_base_alone_would_go_on(base):
    """The right value of what follows: transformers, which knows nothing of the template."""
    model, words = (kind.from_pretrained(base) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = words.apply_chat_template(
        tools.chat("well?", "")["messages"][:1], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert words.decode(answer, skip_special_tokens=True) == "yesyesyes"


def test_the_end_of_a_turn_stops_every_program(tuned, base, tmp_path):
    assert stops_in(tuned.adapter) == STOPS
    assert said(tuned.dir) == said(base, adapter=str(tuned.adapter)) == (talker.ANSWER, "stop")
    pair = jaxtune.load(base, adapter=str(tuned.adapter))
    assert generate_completions(pair, ["well?"], max_new_tokens=12).completions[0].text == "yes"
    chat = ChatModel(open_model(tuned.dir), Sampling(), 12)
    assert "".join(chat.answer(tools.chat("well?", "")["messages"][:1])) == talker.ANSWER
    both = open_with_base(tuned.dir)
    assert both.tuned.stop_ids == both.open_base().stop_ids == STOPS
    (row,) = map(json.loads, (tuned.dir / "samples.jsonl").read_text().splitlines()[:1])
    assert row["before"] == row["after"] == talker.ANSWER
    (row, *_) = map(json.loads, (tuned.dir / "predictions.jsonl").read_text().splitlines())
    assert row["said"] == talker.ANSWER


@pytest.mark.filterwarnings("ignore")
def test_a_merged_export_stops_in_transformers_too(tuned, tmp_path):
    merged = jaxtune.export(tuned.dir, to="hf", out=tmp_path / "merged")
    assert stops_in(merged) == STOPS
    model, words = (kind.from_pretrained(merged) for kind in (AutoModelForCausalLM, AutoTokenizer))
    messages = tools.chat("well?", "")["messages"][:1]
    prompt = words.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    new = answer[0, prompt["input_ids"].shape[1] :]
    assert new.tolist()[-1] == talker.END
    assert words.decode(new, skip_special_tokens=True) == talker.ANSWER


@pytest.mark.parametrize("to", ["orbax", "gguf", "meta"])
def test_every_format_keeps_the_stops(to, tuned, base, tmp_path):
    out = tmp_path / ("model.gguf" if to == "gguf" else "out")
    jaxtune.convert(base, out, to=to, adapter=str(tuned.adapter))
    assert resolve(str(out)).stop_ids() == STOPS


def test_an_adapter_without_the_file_stops_by_its_template(tuned, base, tmp_path):
    """As one of an earlier run, or of PEFT's."""
    adapter = shutil.copytree(tuned.adapter, tmp_path / "adapter")
    (adapter / "generation_config.json").unlink()
    assert said(base, adapter=str(adapter)) == (talker.ANSWER, "stop")
    merged = jaxtune.convert(base, tmp_path / "merged", adapter=str(adapter))
    assert stops_in(merged) == STOPS


def test_a_base_that_is_only_converted_keeps_its_own(base, tmp_path):
    assert stops_in(jaxtune.convert(base, tmp_path / "copy")) == talker.EOS


def test_all_stops_of_a_base_stay(train, tmp_path):
    """The end of its turns beside what its generation_config.json lists, in trained weights too."""
    base = talker.save(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 262]}))
    result = train(base, "whole", "adapter.method=none", "train.samples=0")
    assert stops_in(result.model) == [257, talker.END, 262]
    assert said(result.dir) == said(result.model) == (talker.ANSWER, "stop")


@pytest.mark.parametrize("name", chat_families.FAMILIES)
def test_the_end_of_a_familys_answer(name):
    family = chat_families.FAMILIES[name]
    words = chat_families.tokenizer(family, "bytes")
    pieces = family.account([*tools.chat("well?", "yes")["messages"]])
    answer = next(text for text, is_answer in reversed(pieces) if is_answer)
    end = words.decode([end_of_answer(words)])
    assert end in words.all_special_tokens + [str(t) for t in words.added_tokens_decoder.values()]
    assert answer.removesuffix(end).strip() == "yes"


def test_what_ends_answers_in_the_data_stops_too(train, tmp_path):
    """A template may end a turn with tool calls otherwise than one with an answer; a special token
    within answers stops nothing.
    """
    template = (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "('<|eot_id|>' if m.get('tool_calls') else '<|im_end|>') + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    rows = [tools.chat("a?", "b<|start_header_id|>c"), tools.chat("a?", "b")]
    rows[1]["messages"][1]["tool_calls"] = [call]
    path = tools.write_rows(tmp_path / "rows.jsonl", rows * 2)
    base = talker.save(tmp_path / "base", template)
    keys = ("train.samples=0", "data.eval=null")
    result = train(base, "tools", f"data.train={path}", *keys)
    assert stops_in(result.adapter) == [257, talker.END, 262]
