"""Keys with dots, their traits, and configurations that are made from others."""

import pytest

from jaxtune.config.keys import flatten, keys, keys_with, nest
from jaxtune.config.load import load_config, load_sweep, with_keys
from jaxtune.config.traits import Trait
from jaxtune.core.errors import UserError

RESUMABLE = {
    "train.micro_batch_size", "train.remat", "train.patience", "train.samples",
    "mesh.slices", "mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor",
    "checkpoint.every", "checkpoint.keep", "checkpoint.best", "checkpoint.dir",
    "run.dir", "run.watchdog", "run.profile", "run.trackers",
}  # fmt: skip
KEEPS_START = {
    "adapter.method", "adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.rslora",
    "adapter.targets", "adapter.exclude", "adapter.layers", "adapter.rank_pattern",
    "adapter.alpha_pattern", "trainable",
    "optimizer.name", "optimizer.learning_rate", "optimizer.rates", "optimizer.lora_plus",
    "optimizer.schedule", "optimizer.warmup", "optimizer.betas", "optimizer.eps",
    "optimizer.weight_decay", "optimizer.clip_norm",
    "train.epochs", "train.steps", "train.batch_size", "train.micro_batch_size", "train.neftune",
    "train.ema", "train.eval_every", "train.patience", "train.seed",
    "checkpoint.every", "checkpoint.keep", "checkpoint.best", "checkpoint.dir",
}  # fmt: skip


@pytest.mark.parametrize(
    ("trait", "expected"), [(Trait.RESUMABLE, RESUMABLE), (Trait.KEEPS_START, KEEPS_START)]
)
def test_which_keys_have_a_trait(trait, expected):
    """A new key that is to have one is added here, with a run that shows it."""
    assert keys_with(trait) == expected


def test_a_configuration_is_its_keys_and_values():
    tree = load_config(overrides=["optimizer.rates={embed_tokens: 1e-5}"]).model_dump(mode="json")
    flat = flatten(tree)
    assert list(flat) == keys()
    assert flat["optimizer.rates"] == {"embed_tokens": 1e-5}
    assert flat["data.columns"] == {}
    assert nest(flat) == tree


def test_a_changed_configuration_has_the_other_values_and_what_was_set_before():
    config = load_config(overrides=["adapter.init=DIR", "optimizer.rates={q_proj: 1e-4}"])
    other = with_keys(
        config, {"optimizer.rates": {"v_proj": 1e-5}, "train.remat": "full", "trainable": "all"}
    )
    assert other.optimizer.rates == {"v_proj": 1e-5}
    assert other.train.remat == "full"
    assert other.adapter.model_fields_set == {"init"}
    assert other.model_copy(update={"optimizer": config.optimizer, "train": config.train}) == config


def test_a_changed_configuration_is_checked():
    config = load_config(overrides=["train.batch_size=6"])
    with pytest.raises(UserError, match=r"^parameters: train.micro_batch_size \(4\) must divide"):
        with_keys(config, {"train.micro_batch_size": 4}, "parameters")
    with pytest.raises(UserError, match=r"unknown key 'train.sed'. Did you mean 'train.seed'"):
        with_keys(config, {"train.sed": 4})


def test_a_search_may_nest_its_keys(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "parameters:\n  optimizer:\n    learning_rate: {low: 1e-5, high: 1e-3, log: true}\n"
        "    rates: {low: 0, high: 1}\n  adapter.rank: [4, 8]\n  unknown: {key: [1, 2]}\n"
    )
    parameters = load_sweep(tmp_path / "sweep.yaml").parameters
    assert list(parameters) == [
        "optimizer.learning_rate", "optimizer.rates", "adapter.rank", "unknown.key"
    ]  # fmt: skip
