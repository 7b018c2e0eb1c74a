"""Plans: the shipped configurations on the hardware they name, by the real compiler; memory and
arithmetic against hand counts.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.core.hardware import CHIPS
from jaxtune.planning.compiler_errors import MemoryShortage, memory_shortage
from jaxtune.planning.planner import Plan, plan
from jaxtune.planning.search import search
from jaxtune.planning.show import plan_text, search_text
from jaxtune.planning.target import parse_target
from jaxtune.tracking.metrics_log import read_metrics
from tests.support import tools
from tests.support.cases import OnDemand, thinned

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30
SIZES = {  # hidden, intermediate, layers, heads, tied
    "llama-3.2-1b": (2048, 8192, 16, 32, True), "llama-3.1-8b": (4096, 14336, 32, 32, False),
    "llama-3.3-70b": (8192, 28672, 80, 64, False),
    "llama-3.3-70b-qlora": (8192, 28672, 80, 64, False),
    "llama-3.1-405b": (16384, 53248, 126, 128, False),
}  # fmt: skip
KV_HEADS, VOCAB, RANK = 8, 128256, 16


def target_of(name):
    return re.search(r"\(plan: (\S+)\)", (CONFIGS / f"{name}.yaml").read_text())[1]


def shipped(name, *keys):
    return load_config(CONFIGS / f"{name}.yaml", list(keys))


def arguments(name, fsdp, tensor, rows, slices=1, bits=16.0):
    """Bytes of weights, adapters, moments and batch on one device, counted by hand."""
    hidden, mlp, layers, heads, tied = SIZES[name]
    kv = hidden // heads * KV_HEADS
    matrices = {(hidden, hidden): 2, (kv, hidden): 2, (mlp, hidden): 2, (hidden, mlp): 1}
    blocks = (
        layers
        * sum(out * inputs * count for (out, inputs), count in matrices.items())
        * bits
        / 8
        / (fsdp * tensor)
    )
    outer = (
        VOCAB * hidden * 2 * (1 if tied else 2) / (fsdp * tensor) + (2 * layers + 1) * hidden * 2
    )
    column, row = (
        [(hidden, hidden), (kv, hidden), (kv, hidden), (mlp, hidden), (mlp, hidden)],
        [(hidden, hidden), (hidden, mlp)],
    )
    adapters = sum(RANK * (inputs / fsdp + out / tensor) for out, inputs in column)
    adapters += sum(RANK * (inputs / tensor + out / fsdp) for out, inputs in row)
    batch = rows * 2048 * 5 * 4 / (fsdp * slices)
    return blocks + outer + layers * adapters * 4 * 3 + batch


# On one v5e chip, or four: rows of 2,048 tokens of which google-tunix 0.1.7 fits at most 8, 4 and,
# in int4, 2.
LARGEST = {
    "llama-3.2-1b": ("v5e:1x1", "train.batch_size=24", "mesh.fsdp=1"),
    "llama-3.1-8b": ("v5e:2x2", "train.batch_size=24", "mesh.fsdp=4"),
    "8b nf4": ("v5e:1x1", "train.batch_size=8", "mesh.fsdp=1", "model.dtype=nf4"),
}


@pytest.fixture(scope="module")
def plans():
    """By name the plan and the hand count, each when it is first asked for."""
    two = [
        "mesh.slices=2",
        "mesh.fsdp=4",
        "mesh.tensor=4",
        "train.batch_size=32",
        "train.remat=full",
    ]
    asked = {
        "llama-3.2-1b": (shipped("llama-3.2-1b"), None, (1, 1, 16)),
        "llama-3.1-8b": (shipped("llama-3.1-8b"), None, (16, 1, 16)),
        "8b on two slices": (shipped("llama-3.1-8b", *two), "2*v5e:4x4", (4, 4, 32, 2)),
        "llama-3.3-70b": (shipped("llama-3.3-70b"), None, (32, 2, 64)),
        "70b on v5p": (
            shipped("llama-3.3-70b", "mesh.tensor=1", "train.batch_size=16"),
            "v5p:2x2x2",
            (8, 1, 16),
        ),
        "llama-3.3-70b-qlora": (
            shipped("llama-3.3-70b-qlora"),
            None,
            (4, 4, 16, 1, 4 + 8 / 64 + 32 / 64 / 256),
        ),
        "llama-3.1-405b": (shipped("llama-3.1-405b"), None, (16, 8, 16)),
        **{
            f"{name}, largest": (
                shipped(model_of(name), "train.remat=full", "mesh.tensor=1", *keys),
                on,
                None,
            )
            for name, (on, *keys) in LARGEST.items()
        },
        "too large": (shipped("llama-3.3-70b", "train.remat=dots"), "v5e:4x4", None),
    }

    def planned(name):
        config, on, counted = asked[name]
        return (
            plan(config, on or target_of(name)),
            None if counted is None else arguments(model_of(name), *counted),
        )

    return OnDemand(planned)


def model_of(name):
    return (
        "llama-3.1-8b"
        if name.startswith("8b")
        else "llama-3.3-70b"
        if name.startswith("70b")
        else name
    )


FITTING = [
    "llama-3.2-1b",
    "llama-3.1-8b",
    "8b on two slices",
    "llama-3.3-70b",
    "70b on v5p",
    "llama-3.3-70b-qlora",
    "llama-3.1-405b",
]


@pytest.mark.parametrize("name", thinned(FITTING, "llama-3.2-1b", "llama-3.1-8b"))
def test_every_shipped_configuration_fits_what_it_names(plans, name):
    result, counted = plans[name]
    assert result.fits, plan_text(result)
    assert result.peak_bytes <= result.capacity_bytes
    assert result.argument_bytes == pytest.approx(counted, rel=0.01)
    assert (
        result.peak_bytes
        == result.argument_bytes + result.output_bytes - result.alias_bytes + result.temp_bytes
    )
    assert result.compile_seconds < 60
    assert result.alias_bytes > 0.9 * result.state_bytes  # the new state takes the old one's place
    assert result.output_bytes - result.alias_bytes < 1e6


@pytest.mark.parametrize("name", thinned(LARGEST, "llama-3.2-1b"))
def test_a_batch_fits_that_others_do_not_fit(plans, name):
    result, _ = plans[f"{name}, largest"]
    assert result.fits, plan_text(result)


@pytest.mark.parametrize("name", thinned(FITTING, "llama-3.2-1b", "llama-3.1-8b"))
def test_arithmetic_is_that_of_the_step(plans, name):
    """Each matrix of the blocks twice forward, twice backward, and all but the last of a layer
    twice again where layers are recomputed.
    """
    result, _ = plans[name]
    model = model_of(name)
    hidden, mlp, layers, heads, _ = SIZES[model]
    kv = hidden // heads * KV_HEADS
    blocks = layers * (2 * hidden * hidden + 2 * kv * hidden + 3 * mlp * hidden)
    factor = 4 if model == "llama-3.1-8b" and name == model else 6
    products = (
        2 + 7 if factor == 4 else 2 + 2 + 7
    )  # forward; again; backward two kernels, each of which makes the scores anew
    attention = layers * 2 * 2048 * hidden * products
    again = 0 if factor == 4 else 2 * layers * mlp * hidden
    adapters = 4.5 * result.trainable_parameters
    expected = factor * blocks - again + 4 * VOCAB * hidden + attention + adapters
    assert result.flops_per_token == pytest.approx(expected, rel=0.02)
    assert result.flops_per_step == pytest.approx(result.flops_per_token * result.tokens_per_step)


@pytest.mark.slow
def test_slices_exchange_gradients_of_the_adapter_alone(plans):
    result, _ = plans["8b on two slices"]
    between = {axes: kinds for axes, kinds in result.collectives.items() if "slices" in axes}
    assert set(between) == {"slices"}
    assert set(between["slices"]) == {"all-reduce"}
    gradients = result.state_bytes / 3
    assert 0.2 * gradients < between["slices"]["all-reduce"]["bytes"] < 2.5 * gradients


def test_what_cannot_fit_is_said_with_what_to_change(plans):
    result, _ = plans["too large"]
    assert not result.fits
    needed = result.needed_bytes or result.peak_bytes
    assert needed > result.capacity_bytes
    text = plan_text(result)
    assert "does NOT fit" in text
    assert "train.remat=full" in text
    assert "to make it fit" in text


def test_here_takes_what_the_run_takes(chat_model, tmp_path, quick_compilation):
    """The plan for this machine and the program that the run compiled are the same to the byte,
    state and batch sharded alike.
    """
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(32))
    keys = [
        f"model.source={chat_model}",
        f"data.train={rows}",
        f"run.dir={tmp_path / 'run'}",
        "data.max_length=64",
        "train.steps=2",
    ]
    config = load_config(
        overrides=[
            *keys,
            "mesh.fsdp=4",
            "mesh.tensor=2",
            "train.batch_size=8",
            "adapter.rank=4",
            "optimizer.name=adafactor",
        ]
    )
    result = plan(config, "here")
    jaxtune.train(config, quiet=True)
    measured = {
        row["peak_bytes"] for row in read_metrics(tmp_path / "run") if row["split"] == "train"
    }
    assert measured == {result.peak_bytes}
    assert result.devices == 8
    assert result.capacity_bytes is None


@pytest.mark.parametrize(
    "further",
    thinned(
        [
            ["train.objective=dpo"],
            ["adapter.method=dora"],
            ["adapter.init=pissa"],
            ["adapter.method=none", "trainable=last:1"],
            ["optimizer.name=muon"],
            ["train.ema=0.9"],
            ["model.dtype=int8"],
        ],
        ["train.objective=dpo"],
        ["model.dtype=int8"],
    ),
)
def test_every_method_can_be_planned(chat_model, further, quick_compilation):
    config = load_config(
        overrides=[
            f"model.source={chat_model}",
            "data.max_length=32",
            "train.batch_size=8",
            "adapter.rank=4",
            *further,
        ]
    )
    result = plan(config, "here")
    assert result.peak_bytes > result.argument_bytes > 0
    assert result.flops_per_step > 0


def test_a_plan_needs_config_json_alone(chat_model, tmp_path, quick_compilation):
    alone = tmp_path / "model"
    alone.mkdir()
    (alone / "config.json").write_text((chat_model / "config.json").read_text())
    keys = ["data.max_length=32", "train.batch_size=8"]
    whole, bare, file = (
        plan(load_config(overrides=[f"model.source={source}", *keys]), "here")
        for source in (chat_model, alone, alone / "config.json")
    )
    for result in (bare, file):
        assert dataclasses.replace(result, compile_seconds=0) == dataclasses.replace(
            whole, compile_seconds=0
        )


def test_the_command_prints_and_writes_it(plans, tmp_path, capsys):
    """From the cache: the same configuration was planned above."""
    from jaxtune.cli.main import main

    assert (
        main(
            [
                "plan",
                str(CONFIGS / "llama-3.1-8b.yaml"),
                "--on",
                "v5e:4x4",
                "--json",
                str(tmp_path / "plan.json"),
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result == json.loads(json.dumps(dataclasses.asdict(plans["llama-3.1-8b"][0])))
    sizes = ("argument", "output", "alias", "temp", "peak", "capacity")
    others = ("fits", "devices", "tokens_per_step", "flops_per_step", "collectives")
    for key in (*(f"{size}_bytes" for size in sizes), *others, "compile_seconds"):
        assert key in result
    assert (
        f"fits: {result['peak_bytes'] / GIB:.2f} GiB per device of 15.75" in capsys.readouterr().out
    )
    assert isinstance(jaxtune.plan(CONFIGS / "llama-3.1-8b.yaml", on="v5e:4x4"), Plan)


@pytest.mark.slow
@pytest.mark.slow
def test_a_precision_in_the_environment_reaches_no_kernel(monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    assert plan(shipped("llama-3.2-1b", "train.batch_size=4", "mesh.fsdp=1"), "v5e:1x1").fits


def test_search_finds_what_fits_best_first(tmp_path):
    small = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096,
        "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(small))
    config = load_config(
        overrides=[f"model.source={tmp_path}", "data.max_length=512", "train.batch_size=4"]
    )
    seen = []
    result = search(config, "v5e:2x2", lambda done, total: seen.append((done, total)))
    assert {entry.keys["mesh.tensor"] for entry in result} == {1, 2, 4}
    assert all(entry.plan.fits for entry in result)
    speeds = [entry.plan.tokens_per_second[1] for entry in result]
    assert speeds == sorted(speeds, reverse=True)
    assert seen[-1] == (3, 3)
    text = search_text(result, "v5e:2x2")
    (tmp_path / "found.yaml").write_text(text.split("# 2.")[0])
    pasted = load_config(
        tmp_path / "found.yaml",
        [f"model.source={tmp_path}", "data.max_length=512", "train.batch_size=4"],
    )
    assert plan(pasted, "v5e:2x2") == dataclasses.replace(result[0].plan)
    with pytest.raises(UserError, match=r"no mesh of 4 devices divides train.batch_size = 3"):
        search(
            load_config(
                overrides=[f"model.source={tmp_path}", "data.max_length=512", "train.batch_size=3"]
            ),
            "2*v5e:2x1",
        )


@pytest.mark.parametrize(
    ("name", "kind", "devices", "slices"),
    [
        ("v5e:4x4", "v5e", 16, 1),
        ("2*v6e:8x8", "v6e", 128, 2),
        ("v5p:4x4x4", "v5p", 64, 1),
        ("h100:16", "h100", 16, 1),
        ("here", None, 0, 1),
    ],
)
def test_targets(name, kind, devices, slices):
    result = parse_target(name)
    assert (result.kind, result.devices, result.slices) == (kind, devices, slices)
    assert (result.chip is None) == (name == "here")
    assert kind is None or CHIPS[kind].memory > 15 * GIB


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:4", "v5p:4x4", "h100:12", "h100:2x2", "b17:4x4", "0*v5e:4x4", "v5e:0x4", "there"],
)
def test_targets_that_are_none(name):
    with pytest.raises(UserError, match="--on"):
        parse_target(name)


def test_a_topology_that_the_compiler_has_not_is_refused():
    with pytest.raises(UserError, match="v5e:3x5"):
        plan(shipped("llama-3.1-8b"), "v5e:3x5")


def test_the_compilers_message_is_read():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
    text += "Used 20.5G of 15.75G hbm. (17.25G) exceeds available HBM (15.75G)"
    assert memory_shortage(text) == MemoryShortage(round(17.25 * GIB), round(15.75 * GIB))
    assert memory_shortage("INTERNAL: something else") is None


def test_the_devices_of_this_process_are_left_alone(plans):
    assert jax.devices()[0].platform == "cpu"
