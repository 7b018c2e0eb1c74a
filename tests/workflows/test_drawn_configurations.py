"""Configurations that the schema allows, drawn at random: each trains four steps, is killed after
two, goes on to the numbers of the run that was not, and is exported. JAXTUNE_DRAWN says how many
(40 for a long run); the seed is fixed.
"""

import os
import random
from itertools import islice

import jax
import pytest
import torch
from safetensors.torch import load_file

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.training import setup
from jaxtune.training.callbacks import Callback
from tests.support import tools

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

CASES = int(os.environ.get("JAXTUNE_DRAWN", "3"))
# First those that nothing else tries together.
NAMED = [
    {"model.dtype": "nf4", "adapter.method": "dora"},
    {"model.dtype": "int8", "adapter.method": "dora", "train.objective": "dpo"},
    {"adapter.method": "none", "trainable": "last:1", "train.objective": "orpo"},
    {"model.dtype": "nf4", "adapter.layers": "last:1", "train.objective": "kto"},
]
CHOICES = {
    "model.dtype": ["auto", "auto", "bfloat16", "int8", "nf4"],
    "model.products": ["auto", "auto", "int8"],
    "adapter.method": ["lora", "lora", "dora", "ia3", "none"],
    "adapter.init": ["default", "default", "pissa"],
    "adapter.layers": [None, None, "last:1"],
    "adapter.rslora": [False, True],
    "adapter.dropout": [0.0, 0.2],
    "adapter.rank_pattern": [{}, {"q_proj": 2}],
    "trainable": ["all", "last:1", "[norms]"],
    "train.objective": ["sft", "sft", "dpo", "orpo", "kto", "simpo", "distill"],
    "train.micro_batch_size": [None, 2],
    "train.remat": ["none", "full", "dots"],
    "train.ema": [0.0, 0.5],
    "train.neftune": [0.0, 5.0],
    "data.packing": [True, False],
    "optimizer.name": ["adamw", "adamw", "adafactor", "lion", "muon", "sgd", "schedule-free"],
    "optimizer.lora_plus": [None, 4.0],
    "checkpoint.best": [None, "loss"],
}
PAIRS = [{"prompt": f"{n}+{n}?", "chosen": str(2 * n), "rejected": "no idea"} for n in range(16)]
TIMES = {"step_seconds", "tokens_per_second", "mfu", "peak_bytes"}


class Kill(Callback):
    """Ends the run after the second step, as a kill does."""

    def on_step(self, row):
        if row["step"] == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for whole blocks of NF4."""
    config = tools.tiny_config(hidden_size=64, intermediate_size=128)
    folder = tmp_path_factory.mktemp("drawn") / "model"
    return tools.save_model(folder, config, tools.byte_tokenizer(), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))


def drawn():
    """Yield what the schema may allow, key by key."""
    yield from NAMED
    draw = random.Random(11)
    while True:
        yield {key: draw.choice(values) for key, values in CHOICES.items()}


def overrides(keys, directory, model, files):
    pairs = keys.get("train.objective") not in (None, "sft", "distill")
    rows = files["pairs" if pairs else "chats"]
    common = {
        "model.source": model, "run.dir": directory, "data.train": rows, "data.eval": rows,
        "data.max_length": 96, "train.batch_size": 4, "train.steps": 4, "train.eval_every": 2,
        "optimizer.learning_rate": 1e-3, "checkpoint.every": 2, "adapter.rank": 4,
        "train.samples": 0,
    }  # fmt: skip
    if keys.get("train.objective") == "distill":
        common["distill.teacher"] = model
    given = {key: "null" if value is None else value for key, value in keys.items()}
    return [f"{key}={value}" for key, value in (common | given).items()]


def allowed(model, files, directory):
    """Yield the configurations that no rule refuses."""
    for keys in drawn():
        try:
            load_config(overrides=overrides(keys, directory, model, files))
        except UserError:
            continue
        yield keys


def numbers(directory):
    rows = [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_metrics(directory)
    ]
    (weights,) = directory.glob("*/*model.safetensors")
    return rows, load_file(weights)


@pytest.mark.parametrize("number", range(CASES))
def test_a_drawn_configuration_trains_goes_on_and_is_exported(number, model, tmp_path):
    files = {
        "chats": tools.write_rows(tmp_path / "chats.jsonl", tools.sums(16)),
        "pairs": tools.write_rows(tmp_path / "pairs.jsonl", PAIRS),
    }
    keys = next(islice(allowed(model, files, tmp_path / "none"), number, None))
    runs = [tmp_path / name for name in ("whole", "killed")]
    configs = [load_config(overrides=overrides(keys, run, model, files)) for run in runs]
    try:
        jaxtune.train(configs[0], quiet=True)
    except UserError as error:  # a rule that the schema alone cannot know
        assert not (runs[0] / "metrics.jsonl").exists(), keys
        pytest.skip(f"{keys} is refused: {error}")
    with pytest.raises(KeyboardInterrupt):
        jaxtune.train(configs[1], [Kill()], quiet=True)
    jaxtune.train(configs[1], quiet=True)
    (rows, whole), (again, resumed) = map(numbers, runs)
    assert rows == again, keys
    assert whole.keys() == resumed.keys(), keys
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), (keys, name)
        assert tensor.isfinite().all(), (keys, name)
    jaxtune.export(runs[1], to="hf", out=tmp_path / "merged")
