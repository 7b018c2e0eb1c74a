"""Every configuration key has an effect: each is changed in a small run, and something that is
recorded must change.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from jaxtune.config.keys import keys
from jaxtune.config.load import dump, load_config, schema
from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import read_config
from jaxtune.training import setup
from jaxtune.training.checkpoint import steps_saved
from jaxtune.training.methods import adopt_adapter
from jaxtune.weights import export
from jaxtune.weights.peft import write_adapter
from jaxtune.workflows.train import run
from tests.support import tools
from tests.support.adapters import with_adapter
from tests.support.cases import OnDemand, thinned

pytestmark = pytest.mark.usefixtures("quick_compilation")

TIMES = ("step_seconds", "tokens_per_second", "mfu")
CHANGES = {
    "model.new_tokens": "['<|new|>']", "adapter.train_tokens": "all",
    "model.dtype": "bfloat16", "model.compute_dtype": "bfloat16",
    "adapter.method": "dora", "adapter.rank": 8, "adapter.alpha": 16, "adapter.dropout": 0.3,
    "adapter.rslora": "true",
    "adapter.targets": "[q_proj]", "adapter.exclude": "[q_proj]", "adapter.layers": "last:1",
    "adapter.rank_pattern": "{q_proj: 2}",
    "adapter.alpha_pattern": "{q_proj: 2}", "adapter.modules_to_save": "[lm_head]",
    "data.train_on": "all", "data.max_length": 80, "data.packing": "false", "data.shuffle": "false",
    "optimizer.name": "lion", "optimizer.learning_rate": 1e-3, "optimizer.rates": "{q_proj: 1e-4}",
    "optimizer.lora_plus": 4,
    "optimizer.schedule": "linear", "optimizer.warmup": 2, "optimizer.betas": "[0.5, 0.9]",
    "optimizer.eps": 1e-3,
    "optimizer.weight_decay": 0.5, "optimizer.clip_norm": 0.01,
    "train.epochs": 2, "train.steps": 2, "train.batch_size": 16, "train.micro_batch_size": 4,
    "train.remat": "full", "train.eval_every": 2,
    "train.eval_task": "generation",
    "train.neftune": 5, "train.ema": 0.5, "train.seed": 1, "mesh.data": 8, "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.slices": 2, "mesh.context": 2,
    "checkpoint.every": 100, "checkpoint.keep": 1,
}  # fmt: skip
# What the normal suite runs: those whose reading goes another way than their neighbours'.
KEPT = [
    "model.new_tokens", "adapter.dropout", "adapter.rank_pattern", "data.packing",
    "optimizer.rates", "optimizer.lora_plus", "train.neftune", "train.ema", "mesh.slices",
    "checkpoint.keep",
]  # fmt: skip
PREFERENCES = {
    "train.objective": "simpo", "preference.beta": 0.5, "preference.dpo_loss": "ipo",
    "preference.label_smoothing": 0.2,
}  # fmt: skip
FURTHER = {
    "preference.margin": ("simpo", 2),
    "preference.desirable_weight": ("kto", 3),
    "preference.undesirable_weight": ("kto", 3),
}
DISTILLED = {"distill.top_k": 2, "distill.temperature": 2, "distill.share": 0.9}
# Keys whose other values are files, or are refused, which is tested below or beside the thing
# itself.
OTHERS = {
    "model.source", "adapter.init", "data.train", "data.eval", "data.split", "data.format",
    "data.columns", "data.on_error", "run.dir",
    "trainable", "distill.teacher", "adapter.bias", "checkpoint.best", "checkpoint.dir",
    "run.watchdog",
    "model.products", "run.profile", "run.trackers", "train.patience", "train.samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(chat_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("effects")
    rows = tools.sums(100)
    rows[3]["messages"] += [
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    path = tools.write_rows(directory / "rows.jsonl", rows)
    few = tools.write_rows(directory / "few.jsonl", rows[:6])
    return [
        f"model.source={chat_model}", f"data.train={path}", f"data.eval={few}",
        "data.max_length=96", "adapter.rank=4", "train.batch_size=8",
        "optimizer.learning_rate=1e-2", "checkpoint.every=2", "train.eval_task=lm",
    ]  # fmt: skip


def observe(overrides, directory, monkeypatch):
    """All that a run records, times apart; on one device unless the mesh is the subject, and
    without sample answers, which cost time.
    """
    if not any(override.startswith("mesh.") for override in overrides):
        monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr(
        "jaxtune.workflows.samples._generate_answers", lambda setup, model, rows: [""] * len(rows)
    )
    monkeypatch.setattr(export, "why_not_torch", lambda source, *packages: "not the subject here")
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)
    config = load_config(overrides=[*overrides, f"run.dir={directory}"])
    result = run(config, Reporter(quiet=True))
    rows = [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_metrics(directory)
    ]
    return (
        rows,
        next((result.adapter or result.model).glob("*.safetensors")).read_bytes(),
        steps_saved(read_config(directory)),
    )


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return observe(base, tmp_path_factory.mktemp("plain") / "run", patch)


def test_the_lists_are_whole():
    assert (
        set(keys())
        == CHANGES.keys() | PREFERENCES.keys() | FURTHER.keys() | DISTILLED.keys() | OTHERS
    )


class Compared(NamedTuple):
    """What some runs have in common, and what is recorded where nothing else is set, by a value
    of one more key.
    """

    keys: list[str]
    before: OnDemand


@pytest.fixture(scope="module")
def pairs(base, tmp_path_factory):
    """Pairs of answers, two steps, no evaluation; by objective."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": f"{n}?", "chosen": str(n), "rejected": "no"} for n in range(16)]
    path = tools.write_rows(folder / "pairs.jsonl", rows)
    own = ["data.eval", "data.train", "data.max_length", "optimizer.learning_rate"]
    kept = [override for override in base if override.split("=")[0] not in own]
    kept += [f"data.train={path}", "data.max_length=48", "train.steps=2"]

    def before(objective):
        with pytest.MonkeyPatch.context() as patch:
            return observe([*kept, f"train.objective={objective}"], folder / objective, patch)

    return Compared(kept, OnDemand(before))


@pytest.fixture(scope="module")
def distilled(base, tmp_path_factory):
    """Two steps with a teacher, no evaluation."""
    folder = tmp_path_factory.mktemp("distilled")
    teacher = tools.save_model(
        folder / "teacher", tools.tiny_config(), tools.byte_tokenizer(), seed=3
    )
    kept = [override for override in base if not override.startswith("data.eval=")]
    kept += ["train.steps=2", "train.objective=distill", f"distill.teacher={teacher}"]

    def before(name):
        with pytest.MonkeyPatch.context() as patch:
            return observe(kept, folder / name, patch)

    return Compared(kept, OnDemand(before))


@pytest.mark.parametrize(
    "key",
    thinned([*PREFERENCES, *FURTHER], "preference.beta", "preference.desirable_weight"),
)
def test_changing_a_key_of_preferences_changes_what_is_recorded(key, pairs, tmp_path, monkeypatch):
    objective, value = FURTHER.get(key, ("dpo", PREFERENCES.get(key)))
    common = [*pairs.keys, f"train.objective={objective}"]
    after = observe([*common, f"{key}={value}"], tmp_path / "after", monkeypatch)
    assert after != pairs.before[objective]


@pytest.mark.parametrize("key", thinned(DISTILLED, "distill.share"))
def test_changing_a_key_of_distillation_changes_what_is_recorded(
    key, distilled, tmp_path, monkeypatch
):
    after = observe([*distilled.keys, f"{key}={DISTILLED[key]}"], tmp_path / "after", monkeypatch)
    assert after != distilled.before["plain"]


@pytest.mark.parametrize("key", thinned(CHANGES, *KEPT))
def test_changing_a_key_changes_what_is_recorded(key, base, plain, tmp_path, monkeypatch):
    extra = [f"{key}={CHANGES[key]}"]
    extra += {"mesh.data": ["mesh.fsdp=1"], "mesh.fsdp": ["mesh.data=4"]}.get(key, [])
    assert observe([*base, *extra], tmp_path / "run", monkeypatch) != plain


def test_the_same_again_changes_nothing(base, plain, tmp_path, monkeypatch):
    """Without this the test above could not fail."""
    assert observe(base, tmp_path / "run", monkeypatch) == plain


def test_files_and_formats(base, plain, chat_model, tmp_path, monkeypatch):
    other = tools.save_model(
        tmp_path / "other", tools.tiny_config(), tools.byte_tokenizer(), seed=5
    )
    assert observe([*base, f"model.source={other}"], tmp_path / "a", monkeypatch) != plain
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(30, seed=9))
    assert observe([*base, f"data.train={rows}"], tmp_path / "b", monkeypatch)[1] != plain[1]
    assert observe([*base, f"data.eval={rows}"], tmp_path / "c", monkeypatch)[0][0] != plain[0][0]
    start = observe(
        [*base, f"adapter.init={tmp_path / 'a' / 'adapter'}"], tmp_path / "d", monkeypatch
    )
    assert start[0][1]["loss"] != plain[0][1]["loss"]
    with pytest.raises(UserError, match="the key 'prompt' is missing"):
        observe([*base, "data.format=prompt-completion"], tmp_path / "e", monkeypatch)


def test_an_adapter_to_start_from_brings_its_numbers_and_contradicting_ones_are_refused(
    chat_model, tmp_path, one_device
):
    write_adapter(
        tmp_path,
        with_adapter(chat_model, one_device, ["v_proj"], rank=2, alpha=6.0, rslora=True),
        "base",
    )
    start = f"adapter.init={tmp_path}"
    adopted = adopt_adapter(load_config(overrides=[start])).adapter
    assert (adopted.rank, adopted.alpha, adopted.rslora, adopted.targets) == (
        2,
        6.0,
        True,
        ["v_proj"],
    )
    contradicting = load_config(overrides=["adapter.rank=4", start])
    with pytest.raises(UserError, match=r"adapter\.rank = 4, and adapter\.init has 2"):
        adopt_adapter(contradicting)


def test_targets_in_another_order_than_the_adapters_are_the_same(chat_model, tmp_path, one_device):
    targets = ("q_proj", "v_proj", "down_proj")
    write_adapter(tmp_path, with_adapter(chat_model, one_device, targets=targets), "base")
    start = f"adapter.init={tmp_path}"
    for names in ("[q_proj, v_proj, down_proj]", "[v_proj, down_proj, q_proj]"):
        adopt_adapter(load_config(overrides=[start, f"adapter.targets={names}"]))
    other = load_config(overrides=[start, "adapter.targets=[q_proj, v_proj]"])
    with pytest.raises(UserError, match=r"adapter\.targets = .*adapter\.init has .*down_proj"):
        adopt_adapter(other)


def test_resolved_configuration_reads_back_the_same(tmp_path):
    config = load_config(
        overrides=[
            "optimizer.learning_rate=3e-5",
            "adapter.targets=[q_proj, v_proj]",
            "optimizer.clip_norm=null",
        ]
    )
    (tmp_path / "run.yaml").write_text(dump(config))
    assert load_config(tmp_path / "run.yaml") == config
    assert config.optimizer.learning_rate == 3e-5


def test_shipped_configurations_load():
    paths = list((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        assert load_config(path) != Config(), f"{path} says nothing beyond the defaults"


def test_the_schema_describes_every_key():
    description = json.loads(schema())
    sections = {name.split(".")[0] for name in keys() if "." in name}
    assert description["properties"].keys() == Config.model_fields.keys()
    for section in sections:
        reference = description["properties"][section]["$ref"].rpartition("/")[2]
        for name, field in description["$defs"][reference]["properties"].items():
            assert field["description"], f"{section}.{name}"
