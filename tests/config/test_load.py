"""Keys with dots, their traits, and configurations that are made from others."""

import re

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


def bomb(depth):
    """YAML of some hundred bytes that stands for 9 ** depth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "\n".join([*lines, f"data: {{columns: *a{depth - 1}}}"])


HOSTILE = {
    "aliases": (bomb(12), "stand for more than"),
    "aliases of mappings": (
        "a: &a {x: 1, y: 1}\nb: &b {x: *a, y: *a}\n"
        + "".join(
            f"c{n}: &c{n} {{x: *{'b' if not n else f'c{n - 1}'}, y: *b}}\n" for n in range(99)
        ),
        "nested more than",
    ),
    "an alias of itself": ("data: &a {columns: *a}", "nested more than"),
    "a list in itself": ("data: {train: &a [*a]}", "nested more than"),
    "depth": ("train: " + "[" * 5000 + "]" * 5000, "nested more than"),
    "depth of mappings": ("{a: " * 3000 + "1" + "}" * 3000, "nested more than"),
    "size": ("# " + "x" * (2 << 20), "more than 1 MiB"),
    "a thousand digits": (f"train: {{seed: {'9' * 1000}}}", "train.seed = 9999999999"),
    "ten thousand digits": (f"train: {{seed: {'9' * 10_000}}}", "digits"),
    "infinity": ("optimizer:\n  learning_rate: .inf", ":2: optimizer.learning_rate = inf"),
    "no number": ("optimizer: {eps: .nan}", "optimizer.eps = nan"),
    "overflow": ("run: {watchdog: 1e999}", "run.watchdog = inf"),
    "infinity in a list": ("optimizer: {betas: [0.9, -.inf]}", "optimizer.betas = -inf"),
    "infinity in a source": (
        "data: {train: [{source: x, weight: .inf}]}",
        "data.train.weight = inf",
    ),
    "a key twice": ("train: {seed: 1}\ntrain: {seed: 2}", ":2: train is given twice"),
    "a key twice in a list": (
        "data:\n  train:\n  - source: a\n    source: b",
        r":4: data.train\[0\].source is given twice",
    ),
    "a list as a key": ("? [a, b]\n: 1", "not valid YAML"),
    "a number as a key": ("1: 2", "keys should be strings"),
    "an object": ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
    "a day that is none": ("train: {seed: 2026-13-45}", "Quote what is meant as a text"),
    "control characters": ("a: \x01", "not valid YAML"),
    "a list": ("[1, 2]", "is a mapping of keys"),
    "a text for a section": ("train: words", "train"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_holds_is_bounded_and_refused_in_a_line(name, tmp_path):
    text, message = HOSTILE[name]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert "c.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"train.seed={'9' * 9999}", "digits"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate = inf"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate = inf"),
        ("optimizer.rates={q_proj: .nan}", r"optimizer.rates.q_proj = nan"),
        ("train.steps=99999999999999999999", "train.steps = 99999999999999999999"),
        ("data.columns=" + "{a: " * 500 + "1" + "}" * 500, "nested more than"),
    ],
)
def test_overrides_are_bounded_too(override, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=[override])


def test_every_number_of_the_schema_refuses_infinity():
    for key in keys():
        for value in (float("inf"), float("nan")):
            with pytest.raises(UserError, match=f"^config: {re.escape(key)} = {value} is not"):
                with_keys(load_config(), {key: value})


def test_an_alias_that_is_small_may_stand(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {train: &a x.jsonl, eval: *a}\n")
    assert load_config(tmp_path / "c.yaml").data.eval == "x.jsonl"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.name=schedule-free", "optimizer.betas=[0, 0.9]"], "schedule-free averages"),
        (["train.objective=orpo", "preference.label_smoothing=0.1"], "and train.objective is orpo"),
        (["train.objective=kto", "preference.label_smoothing=0.1"], "and train.objective is kto"),
        (["train.objective=sft", "preference.label_smoothing=0.1"], "and train.objective is sft"),
        (
            ["train.objective=dpo", "preference.dpo_loss=ipo", "preference.label_smoothing=0.1"],
            "preference.dpo_loss=sigmoid",
        ),
        (["train.objective=dpo", "data.train_on=all"], "Leave data.train_on out"),
    ],
)
def test_what_would_be_ignored_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=overrides)


def test_lions_betas_are_its_papers_where_none_are_given():
    """Chen et al. 2023, algorithm 2; an earlier run keeps those of its record."""
    assert load_config(overrides=["optimizer.name=lion"]).optimizer.betas == [0.9, 0.99]
    given = ["optimizer.name=lion", "optimizer.betas=[0.9, 0.999]"]
    assert load_config(overrides=given).optimizer.betas == [0.9, 0.999]
    assert load_config().optimizer.betas == [0.9, 0.999]
