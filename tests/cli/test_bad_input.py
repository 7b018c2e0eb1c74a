"""Bad input: one clear line, exit 2, nothing left behind."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.cli.main import main
from jaxtune.core.errors import UserError
from tests.support import tools

GOOD = tools.chat("1+1?", "2")


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs a command; gives its exit status and what it wrote on stderr."""
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def broken(chat_model, tmp_path):
    """A copy of the model to break."""
    return shutil.copytree(chat_model, tmp_path / "broken")


def assert_refused(cli, tmp_path, model, *expected, rows=None, extra=()):
    """Training is refused with one message that has all that is expected, and makes no run
    directory.
    """
    data = (
        rows
        if isinstance(rows, str)
        else tools.write_rows(tmp_path / "rows.jsonl", [GOOD] if rows is None else rows)
    )
    code, err = cli(
        "train",
        f"model.source={model}",
        f"data.train={data}",
        f"run.dir={tmp_path / 'run'}",
        "train.batch_size=8",
        *extra,
    )
    message = err[err.index("jaxtune: ") :]
    assert code == 2, err
    assert "Traceback" not in err
    assert len(message.strip().splitlines()) == 1, message
    for text in expected:
        assert text in message, message
    assert not (tmp_path / "run").exists()


def lines(path, *texts):
    path.write_bytes(
        b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts) + b"\n"
    )
    return str(path)


GOOD_LINE = json.dumps(GOOD)
BAD_ROWS = {
    "malformed JSON": ([GOOD_LINE, "", '{"messages": [}'], "rows.jsonl:3: not valid JSON"),
    "not an object": ([GOOD_LINE, "[1]"], "rows.jsonl:2: a list instead of a JSON object"),
    "no messages": (
        [GOOD_LINE, '{"text": "x"}'],
        "rows.jsonl:2: the key 'messages' is missing; there are text",
    ),
    "messages of another type": (['{"messages": "x"}'], "rows.jsonl:1: 'messages' is not a list"),
    "no messages in the list": (
        ['{"messages": []}'],
        "rows.jsonl:1: 'messages' is not a list with at least one",
    ),
    "unknown role": (
        ['{"messages": [{"role": "asistant", "content": "x"}]}'],
        "messages[0]: unknown role 'asistant'",
    ),
    "suggested role": (
        ['{"messages": [{"role": "asistant", "content": "x"}]}'],
        "Did you mean 'assistant'?",
    ),
    "content of another type": (
        ['{"messages": [{"role": "user", "content": 3}]}'],
        "messages[0]: 'content' is not a string",
    ),
    "no completion": (['{"prompt": "x", "completions": "y"}'], "Did you mean 'completions'?"),
    "prompt of another type": (
        ['{"prompt": 1, "completion": "y"}'],
        "rows.jsonl:1: 'prompt' is of type int, not a string",
    ),
    "not UTF-8": ([GOOD_LINE, b'{"prompt": "\xa3"}'], "rows.jsonl:2: not UTF-8"),
    "empty": ([""], "rows.jsonl: there are no rows"),
    "nothing supervised": (
        ['{"messages": [{"role": "user", "content": "x"}]}'],
        "no row has a supervised token",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows(name, cli, tmp_path, chat_model):
    texts, expected = BAD_ROWS[name]
    assert_refused(cli, tmp_path, chat_model, expected, rows=lines(tmp_path / "rows.jsonl", *texts))


def test_missing_files(cli, tmp_path, chat_model):
    assert_refused(cli, tmp_path, chat_model, "nowhere.jsonl", rows=str(tmp_path / "nowhere.jsonl"))
    assert_refused(cli, tmp_path, tmp_path / "no-model", "does not exist")
    code, err = cli("train", tmp_path / "none.yaml")
    assert (code, err) == (2, f"jaxtune: {tmp_path / 'none.yaml'} does not exist.\n")


CONFIGS = {
    "model:\n  sorce: x\n": ":2: unknown key 'model.sorce'. Did you mean 'model.source'?",
    "modell: {}\n": ":1: unknown key 'modell'. Did you mean 'model'?",
    "train:\n  batch_size: many\n": (
        ":2: train.batch_size = 'many': input should be a valid integer"
    ),
    "train:\n\n  batch_size: '8'\n": ":3: train.batch_size = '8': input should be a valid integer",
    "adapter: {rank: 0}\n": ":1: adapter.rank = 0: input should be greater than or equal to 1",
    "adapter: {rank: 4.0}\n": ":1: adapter.rank = 4.0: input should be a valid integer",
    "adapter: {dropout: 1.0}\n": ":1: adapter.dropout = 1.0: input should be less than 1",
    "optimizer: {learning_rate: -1e-4}\n": (
        ":1: optimizer.learning_rate = -0.0001: input should be greater than 0"
    ),
    "optimizer: {schedule: cosin}\n": (
        "optimizer.schedule = 'cosin': input should be 'cosine', 'linear', 'constant' or 'wsd'"
    ),
    "train: {batch_size: 8, micro_batch_size: 3}\n": (
        "train.micro_batch_size (3) must divide train.batch_size (8)"
    ),
    "data: {train: x\n": "not valid YAML",
    "- a\n": "a configuration is a mapping of keys, not a list",
    "train: {seed: 1}\ntrain: {seed: 2}\n": ":2: train is given twice",
    "adapter: {method: lokr}\n": "adapter.method = 'lokr': input should be 'lora'",
    "mesh: {slices: 0}\n": "mesh.slices = 0: input should be greater than or equal to 1",
    "checkpoint: {best: loss}\n": "checkpoint.best needs evaluations",
    "data:\n  train: [{sorce: x}]\n": ":2: unknown key 'data.train[0].sorce'.",
    "data:\n  train: [a.jsonl, {source: x, weight: 0}]\n": (
        ":2: data.train[1].weight = 0: input should be greater than 0"
    ),
    "data: {split: 5%, eval: x}\n": "data.split and data.eval are both set",
    "data: {split: 100%}\n": "data.split (100%) must lie below 100%",
    "data: {columns: {prompt: 3}}\n": "data.columns.prompt = 3: input should be a valid string",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_configuration(text, cli, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, err = cli("config", path)
    assert code == 2
    assert CONFIGS[text] in err
    assert str(path) in err
    assert len(err.strip().splitlines()) == 1


def test_overrides(cli):
    assert cli("config", "train.batch_sise=3") == (
        2,
        "jaxtune: command line: unknown key 'train.batch_sise'. Did you mean 'train.batch_size'?\n",
    )
    assert "not of the form" in cli("config", "=3")[1]
    assert (
        "unknown key 'train.batch_sise'" in cli("train", "--quiet", "train.batch_sise=3")[1]
    )  # behind an option too
    assert cli("train", "--quiet", "--frsh", "train.batch_size=3") == (
        2,
        "usage: jaxtune [-h] [--version] COMMAND ...\njaxtune: error: unrecognized arguments: "
        "--frsh\n",
    )
    assert "unrecognized arguments: x" in cli("report", "a", "--out", "b", "x")[1]
    assert "one configuration file at most" in cli("config", "a.yaml", "b.yaml")[1]


def test_targets_and_mesh(cli, tmp_path, chat_model):
    assert_refused(
        cli,
        tmp_path,
        chat_model,
        "'q_prj' matches no module",
        "Did you mean 'q_proj'?",
        extra=["adapter.targets=[q_prj]"],
    )
    assert_refused(
        cli,
        tmp_path,
        chat_model,
        "needs 3 devices and there are 8",
        extra=["mesh.data=3", "mesh.fsdp=1"],
    )
    assert_refused(
        cli,
        tmp_path,
        chat_model,
        "train.batch_size = 6 does not divide over 8 devices",
        extra=["train.batch_size=6"],
    )


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM, HEAD = "model.layers.1.input_layernorm.weight", "lm_head.weight"
WEIGHTS = {
    "missing": (lambda t: t.pop(NORM), f"missing: {NORM}"),
    "unexpected": (
        lambda t: t.update({"model.extra.weight": np.ones(2, np.float32)}),
        "unexpected: model.extra.weight",
    ),
    "misshapen": (
        lambda t: t.update({NORM: np.ones(31, np.float32)}),
        f"of the wrong shape: {NORM} [31] instead of [32]",
    ),
    "transposed": (
        lambda t: t.update({HEAD: np.ascontiguousarray(t[HEAD].T)}),
        "lm_head.weight [32, 288] instead of [288, 32]",
    ),
    "integers": (lambda t: t.update({NORM: np.ones(32, np.int8)}), "has dtype I8"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, cli, tmp_path, broken):
    change, expected = WEIGHTS[name]
    edit(broken / "model.safetensors", change)
    assert_refused(cli, tmp_path, broken, expected)


def test_weights_cut_short(cli, tmp_path, broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(cli, tmp_path, broken, "model.safetensors is not a whole safetensors file")


def test_gguf_cut_short(cli, tmp_path, smollm2):
    data = smollm2.read_bytes()
    for size in (2, 3000, 1_500_000, len(data) - 1000):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        assert_refused(cli, tmp_path, tmp_path / "cut.gguf", "cut.gguf is not a whole GGUF file")


ARCHITECTURES = {
    "another architecture": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        "GPT2LMHeadModel (model_type 'gpt2') is not supported",
    ),
    "unknown key": ({"residual_multiplier": 0.22}, "does not understand: residual_multiplier"),
    "unknown activation": (
        {"hidden_act": "quick_gelu"},
        "activation 'quick_gelu' is not supported",
    ),
    "unknown rope": (
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "rope_type 'proportional' is not supported",
    ),
    "rope without factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "rope_type linear needs factor",
    ),
    "unknown rope number": (
        {"rope_parameters": {"rope_type": "default", "bend": 2}},
        "does not understand: bend",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "heads do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads (3) must divide"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, cli, tmp_path, broken):
    change, expected = ARCHITECTURES[name]
    tools.rewrite_config(broken, lambda raw: raw.update(change))
    assert_refused(cli, tmp_path, broken, expected, "config.json: ")


def test_a_dtype_that_python_asks_for(chat_model):
    import jaxtune

    with pytest.raises(
        UserError, match="The dtype 'int7' is not supported; supported are auto, float32"
    ):
        jaxtune.load(str(chat_model), dtype="int7")


def test_other_commands(cli, tmp_path, chat_model):
    rows = tools.write_rows(tmp_path / "rows.jsonl", [GOOD])
    assert cli("eval", chat_model, "--data", rows, "--task", "sorting")[0] == 2
    assert (
        "is not a PEFT adapter"
        in cli("generate", chat_model, "--prompt", "x", "--adapter", tmp_path)[1]
    )
    assert (
        "temperature = -1.0"
        in cli("generate", chat_model, "--prompt", "x", "--temperature", "-1")[1]
    )
    assert (
        "max_new_tokens = 0"
        in cli("generate", chat_model, "--prompt", "x", "--max-new-tokens", "0")[1]
    )
    for command in (
        ("export", tmp_path, "--to", "peft", "--out", tmp_path / "out"),
        ("report", tmp_path),
    ):
        code, err = cli(*command)
        assert code == 2
        assert "is not a run directory" in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "report.html").exists()
    assert cli("no-such-command")[0] == 2
