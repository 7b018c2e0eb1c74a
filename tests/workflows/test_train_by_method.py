"""Whole runs of methods other than LoRA: what they leave behind, how they go on, what is
exported.
"""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.training import setup
from jaxtune.weights.peft import open_adapter
from jaxtune.workflows.export import export_run
from jaxtune.workflows.train import run
from tests.support import tools
from tests.support.cases import thinned

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers):UserWarning"),
]
TIMES = ("step_seconds", "tokens_per_second", "mfu")
PAIRS = [{"prompt": f"{n}+{n}?", "chosen": str(2 * n), "rejected": "no idea"} for n in range(24)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A bfloat16 model with whole blocks of NF4."""
    config = tools.tiny_config(hidden_size=64, intermediate_size=128)
    return tools.save_model(
        tmp_path_factory.mktemp("wide"), config, tools.byte_tokenizer(), dtype=torch.bfloat16
    )


@pytest.fixture
def train(tmp_path, monkeypatch, chat_model):
    """Trains on one device; the run."""
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)
    rows = tools.write_rows(tmp_path / "chats.jsonl", tools.sums(24))
    pairs = tools.write_rows(tmp_path / "pairs.jsonl", PAIRS)

    def call(*keys, directory="run", data="chats", model=chat_model):
        path = pairs if data == "pairs" else rows
        common = [
            f"model.source={model}", f"run.dir={tmp_path / directory}", f"data.train={path}",
            f"data.eval={path}", "data.max_length=96",
            "train.batch_size=4", "train.steps=6", "optimizer.learning_rate=1e-2",
            "checkpoint.every=2", "adapter.rank=4",
        ]  # fmt: skip
        return run(load_config(overrides=[*common, *keys]), Reporter(quiet=True))

    return call


@pytest.mark.parametrize("objective", thinned(["dpo", "orpo", "simpo", "kto"], "dpo"))
def test_a_preference_run_raises_margin_and_accuracy(objective, train):
    result = train(
        f"train.objective={objective}", "preference.beta=0.5", "train.eval_every=3", data="pairs"
    )
    assert result.after["task"] == "preference"
    assert result.after["margin"] > result.before["margin"]
    assert result.after["accuracy"] > max(result.before["accuracy"], 0.9)
    assert result.after["loss"] < result.before["loss"]
    rows = result.metrics
    assert all("margin" in row for row in rows)
    assert len([row for row in rows if row["split"] == "eval"]) == 3
    samples = [json.loads(line) for line in (result.dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["wanted"] for sample in samples] == [row["chosen"] for row in PAIRS[:5]]
    assert result.verification.torch_difference < 1e-3
    assert "Margin of the preferred answer" in (result.dir / "report.html").read_text()


def test_all_weights_train_and_come_back_as_a_model(train, tmp_path, wide):
    keys = ["adapter.method=none", "optimizer.learning_rate=1e-3", "train.ema=0.5"]
    result = train(*keys, model=wide)
    assert result.adapter is None
    assert result.after["loss"] < result.before["loss"]
    tensors = load_file(result.model / "model.safetensors")
    before = AutoModelForCausalLM.from_pretrained(wide).state_dict()
    assert {value.dtype.name for value in tensors.values()} == {"bfloat16"}
    assert (tensors.keys() | {"lm_head.weight"}) == before.keys()
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    assert all(
        (tensors[name].astype(np.float32) != before[name].float().numpy()).any() for name in names
    )
    loss = jaxtune.evaluate(str(result.dir), str(tmp_path / "chats.jsonl"), task="lm")["loss"]
    assert loss == pytest.approx(
        result.after["loss"], rel=0.02
    )  # the weights that train are rounded to bfloat16
    reference = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    model, _ = jaxtune.load(str(result.dir))
    model.compute_dtype = np.dtype(np.float32)
    ids = np.random.default_rng(0).integers(0, 256, (2, 12))
    np.testing.assert_allclose(model(ids), tools.torch_logits(reference, ids), atol=2e-4)
    with pytest.raises(
        UserError, match=r"has no adapter: its weights were trained\. Export them with --to hf"
    ):
        export_run(result.dir, tmp_path / "out")
    export_run(result.dir, tmp_path / "copy", to="hf")
    assert all(
        np.array_equal(value, tensors[name])
        for name, value in load_file(tmp_path / "copy" / "model.safetensors").items()
    )


def test_a_quantized_base_trains_an_adapter_that_fits_the_original(train, tmp_path, wide):
    result = train("model.dtype=nf4", model=wide)
    assert result.after["loss"] < result.before["loss"]
    assert result.verification.reload_difference <= 1e-6 * result.verification.largest_logit
    assert result.verification.torch_difference < 1e-3 * result.verification.largest_logit
    export_run(result.dir, tmp_path / "merged", to="hf")
    merged, base = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", wide))
    adapter = open_adapter(result.adapter)
    name = "model.layers.0.mlp.down_proj"
    a, b = (adapter.tensors[f"base_model.model.{name}.lora_{part}.weight"].all() for part in "AB")
    expected = base[f"{name}.weight"].astype(np.float32) + adapter.config.scale_of(name) * b @ a
    np.testing.assert_allclose(
        merged[f"{name}.weight"].astype(np.float32), expected, rtol=2**-8, atol=1e-6
    )
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size < 1.01 * (
        wide / "model.safetensors"
    ).stat().st_size


RESUMED = {
    "pissa": ["adapter.init=pissa"],
    "dora and neftune": ["adapter.method=dora", "train.neftune=5"],
    "weights, muon, an average": [
        "adapter.method=none",
        "trainable=last:1",
        "optimizer.name=muon",
        "train.ema=0.9",
    ],
    "schedule-free": ["optimizer.name=schedule-free", "optimizer.schedule=constant"],
    "adafactor": ["optimizer.name=adafactor"],
    "dpo": ["train.objective=dpo"],
}


@pytest.mark.parametrize("name", thinned(RESUMED, "dpo"))
def test_a_run_that_was_stopped_ends_as_the_one_that_was_not(name, train, monkeypatch):
    """After a restart the reference is still what training started from, and the averages go on."""
    keys, data = RESUMED[name], "pairs" if name == "dpo" else "chats"
    monkeypatch.setattr(
        "jaxtune.weights.export.why_not_torch", lambda source, *packages: "not the subject here"
    )
    monkeypatch.setattr(
        "jaxtune.weights.verify.why_not_torch", lambda source, *packages: "not the subject here"
    )
    whole = train(*keys, directory="whole", data=data)
    from jaxtune.training import loop

    record = loop.Recorder.record

    def stop(self, pending):
        record(self, pending)
        if pending.index == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Recorder, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            train(*keys, directory="stopped", data=data)
    stopped = train(*keys, directory="stopped", data=data)
    rows = [
        [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in read_metrics(result.dir)
        ]
        for result in (whole, stopped)
    ]
    assert rows[0] == rows[1]
    files = [
        next((result.adapter or result.model).glob("*.safetensors")).read_bytes()
        for result in (whole, stopped)
    ]
    assert files[0] == files[1]


CONTRADICTIONS = {
    "trainable=last:2": "trainable names weights, and adapter.method is an adapter",
    "adapter.init=pissa adapter.method=dora": "adapter.init=pissa is for adapter.method=lora",
    "adapter.method=none model.dtype=nf4": "leaves nothing frozen that model.dtype could quantize",
    "adapter.method=none optimizer.lora_plus=16": "optimizer.lora_plus is for adapters",
    "optimizer.name=muon optimizer.learning_rate=auto": (
        "optimizer.learning_rate=auto is a rule for AdamW"
    ),
    "optimizer.name=schedule-free optimizer.schedule=cosine": "schedule-free replaces the schedule",
    "train.objective=distill": "train.objective=distill needs distill.teacher",
    "distill.teacher=x": "distill.teacher is set, and train.objective is not distill",
}


@pytest.mark.parametrize("keys", CONTRADICTIONS)
def test_contradictions_are_refused_before_anything_is_read(keys):
    with pytest.raises(UserError, match=CONTRADICTIONS[keys]):
        load_config(overrides=keys.split())
