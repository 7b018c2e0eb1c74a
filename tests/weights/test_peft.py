"""Adapters in and out, against PEFT itself."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from jaxtune.adapters.inject import adapted, inject, partition_trainable
from jaxtune.adapters.lora import LoRAConfig
from jaxtune.core.errors import RunError, UserError
from jaxtune.data.batch import Batch
from jaxtune.objectives.objective import DETERMINISTIC
from jaxtune.objectives.sft import sft
from jaxtune.weights import export, verify
from jaxtune.weights.export import export_adapter
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, entries, open_adapter, write_adapter
from jaxtune.weights.source import resolve
from tests.support import peft_side, tools
from tests.support.adapters import with_adapter
from tests.support.cases import thinned

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = verify.pad_texts([[5, 9, 200, 7, 3], [1, 2, 3, 4, 5, 6, 7]])


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "some modules": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.(0|2)\..*(q|up)_proj"},
    "excluded": {"exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "layers by pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "ranks": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "down_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "q_proj": 3},
    },
    "rslora ranks": {"use_rslora": True, "rank_pattern": {r"layers\.(0|1)\.mlp\.up_proj": 7}},
    "dora": {"use_dora": True},
    "dora layers": {
        "use_dora": True,
        "layers_to_transform": [1],
        "target_modules": ["q_proj", "up_proj"],
    },
    "saved": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "saved linear": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
    "bias": {"bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "bias of the adapted": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "dora head": {"target_modules": ["lm_head"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 5, 200]},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 5], "lm_head": [5, 200, 7]},
    },
}
TIED = ("lora", "saved", "embedding", "head", "tokens")


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers):UserWarning")
@pytest.mark.parametrize(
    ("name", "tied"),
    thinned(
        [(name, False) for name in VARIANTS] + [(name, True) for name in TIED],
        *((name, False) for name in ("lora", "rslora ranks", "layers", "dora", "bias")),
        *((name, True) for name in TIED),
        unpack=True,
    ),
)
def test_an_adapter_of_peft_computes_the_same_here_and_comes_back_the_same(
    name, tied, tmp_path, one_device
):
    config = tools.tiny_config(attention_bias=True, tie_word_embeddings=tied)
    tools.save_model(tmp_path / "base", config)
    reference = peft_side.lora(tools.random_model(config), b_std=0.1, **VARIANTS[name])
    reference.save_pretrained(tmp_path / "adapter")
    model = load_model(resolve(str(tmp_path / "base")), one_device)
    attach(model, open_adapter(tmp_path / "adapter"), one_device)
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    ids[:, 3:7] = 200, 9, 7, 5  # tokens that some variants train by themselves
    expected = tools.torch_logits(reference, ids)
    np.testing.assert_allclose(model(ids), expected, atol=2e-4)
    assert np.abs(expected - tools.torch_logits(tools.random_model(config), ids)).max() > 0.1
    (tmp_path / "back").mkdir()
    write_adapter(tmp_path / "back", model, "base")
    before, after = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("adapter", "back")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    again = PeftModel.from_pretrained(tools.random_model(config), tmp_path / "back").eval()
    np.testing.assert_allclose(tools.torch_logits(again, ids), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
@pytest.mark.parametrize(
    "name",
    thinned(
        [
            "lora",
            "ranks",
            "dora",
            "dora layers",
            "saved",
            "bias of the adapted",
            "embedding",
            "head",
            "dora head",
            "tokens",
            "tokens of both",
            "tied tokens",
        ],
        *("ranks", "dora head", "embedding", "tied tokens"),
    ),
)
def test_gradients_of_every_variant_equal_pefts(name, tmp_path, one_device):
    config = tools.tiny_config(attention_bias=True, tie_word_embeddings=name.startswith("tied"))
    name = name.removeprefix("tied ")
    tools.save_model(tmp_path / "base", config)
    reference = peft_side.lora(tools.random_model(config), b_std=0.1, **VARIANTS[name])
    reference.save_pretrained(tmp_path / "adapter")
    random = np.random.default_rng(0)
    rows = [(random.integers(0, 256, 20), random.random(20) < 0.5) for _ in range(3)]
    rows[0][0][3:7] = 200, 9, 7, 5
    total, _ = peft_side.token_loss(reference, rows)
    total.backward()
    expected = {
        key.replace(".default", "").replace(".modules_to_save", ""): p.grad.numpy()
        for key, p in reference.named_parameters()
        if p.grad is not None
    }
    model = load_model(resolve(str(tmp_path / "base")), one_device)
    attach(model, open_adapter(tmp_path / "adapter"), one_device)
    graph, trainable, frozen = partition_trainable(model)
    ids, supervised = (np.stack(part) for part in zip(*rows, strict=True))
    ones = np.ones((3, 19), np.int32)
    batch = Batch(
        ids[:, :-1].astype(np.int32),
        ids[:, 1:].astype(np.int32),
        supervised[:, 1:].astype(np.float32),
        ones,
        np.cumsum(ones, 1, dtype=np.int32) - 1,
    )
    loss, grads = jax.jit(
        jax.value_and_grad(
            lambda part: sft(
                nnx.merge(graph, part, frozen), batch, DETERMINISTIC._replace(remat="full")
            )[0]
        )
    )(trainable)
    np.testing.assert_allclose(loss, float(total.detach()), rtol=1e-5)
    gradients = {}
    for entry in entries(nnx.merge(graph, grads, frozen)):
        name = entry.name.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")
        gradients[name] = np.asarray(entry.variable[...])[entry.index]
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        assert np.linalg.norm(gradients[key] - value) <= 1e-3 * np.linalg.norm(value), key


def test_square_factors_are_not_transposed(tmp_path, one_device):
    """Rank equal to the width: A, B and the layer are all square, so only values can tell."""
    config = tools.tiny_config(num_key_value_heads=4, intermediate_size=32)
    tools.save_model(tmp_path / "base", config)
    model = with_adapter(tmp_path / "base", one_device, rank=32, alpha=16.0)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, "base")
    loaded = PeftModel.from_pretrained(tools.random_model(config), tmp_path / "adapter").eval()
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    np.testing.assert_allclose(model(ids), tools.torch_logits(loaded, ids), atol=2e-4)
    plain = np.asarray(load_model(resolve(str(tmp_path / "base")), one_device)(ids))
    assert np.abs(np.asarray(model(ids)) - plain).max() > 0.1


def test_initialization_is_pefts(tmp_path, one_device):
    """A uniform within 1 / sqrt(in), B zero; equal for a layer whatever else is adapted,
    different between layers and seeds.
    """
    tools.save_model(tmp_path, tools.tiny_config())

    def factors(targets, seed):
        model = load_model(resolve(str(tmp_path)), one_device)
        inject(model, LoRAConfig(16, 32.0, targets=targets), seed, one_device)
        return {
            path[-1]: np.asarray(layer.lora_A[...]) for path, layer in adapted(model).items()
        }, adapted(model)

    everything, layers = factors("all-linear", 0)
    assert len(everything) == 7
    assert not any(np.asarray(layer.lora_B[...]).any() for layer in layers.values())
    bound = 1 / np.sqrt(32)
    assert everything["q_proj"].dtype == np.float32
    assert np.abs(everything["q_proj"]).max() <= bound
    assert everything["q_proj"].std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    np.testing.assert_array_equal(factors(("v_proj",), 0)[0]["v_proj"], everything["v_proj"])
    assert not np.array_equal(everything["q_proj"][0], everything["q_proj"][1])
    assert not np.array_equal(everything["q_proj"], everything["o_proj"])
    assert not np.array_equal(factors(("v_proj",), 1)[0]["v_proj"], everything["v_proj"])


@pytest.fixture
def adapter(chat_model, tmp_path, one_device):
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", with_adapter(chat_model, one_device), "base")
    return tmp_path / "adapter"


def test_the_file_holds_the_declared_keys_and_no_other(adapter):
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    expected = {
        f"base_model.model.model.layers.{i}.{n}.lora_{f}.weight"
        for i in range(3)
        for n in names
        for f in "AB"
    }
    assert keys == expected


KEYS = {
    "missing": (lambda t, k: t.pop(k), "missing: {key}"),
    "unexpected": (lambda t, k: t.update({k + "x": t[k]}), "unexpected: {key}x"),
    "misshapen": (lambda t, k: t.update({k: t[k][:-1].copy()}), "of the wrong shape: {key}"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_do_not_fit_are_listed(name, adapter, chat_model, one_device):
    change, expected = KEYS[name]
    path, key = (
        adapter / "adapter_model.safetensors",
        "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight",
    )
    tensors = load_file(path)
    change(tensors, key)
    save_file(tensors, path)
    with pytest.raises(UserError) as error:
        attach(load_model(resolve(str(chat_model)), one_device), open_adapter(adapter), one_device)
    assert expected.format(key=key) in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        {"lora_bias": True},
        {"bias": "some"},
        {"trainable_token_indices": "all"},
        {"target_modules": None},
        {"new": 1},
    ],
)
def test_options_that_are_not_implemented_are_refused(option, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | option))
    with pytest.raises(UserError, match=next(iter(option))):
        open_adapter(adapter)


def test_biases_of_some_layers_of_a_stack_alone_are_refused(tmp_path, one_device):
    tools.save_model(tmp_path, tools.tiny_config(attention_bias=True))
    with pytest.raises(UserError, match="bias: lora_only where some layers"):
        with_adapter(tmp_path, one_device, bias="lora_only", layers=(1,))


def exported(directory, model, chat_model, mesh):
    source = resolve(str(chat_model))
    return export_adapter(
        directory, model, source, source.tokenizer(), TEXTS, mesh, dtype="auto", compute="auto"
    )


def test_export_is_verified_by_both_and_carries_the_tokenizer(chat_model, tmp_path, one_device):
    result = exported(
        tmp_path / "out", with_adapter(chat_model, one_device), chat_model, one_device
    )
    assert result.tokens == 12
    assert result.reload_difference < 1e-5
    assert result.torch_difference < 1e-3
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= names
    assert resolve(str(chat_model)).tokenizer().chat_template == tools.CHATML
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(chat_model)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tools.CHATML


@pytest.mark.parametrize("breakage", ["factor", "scale", "peft"])
def test_an_export_that_computes_something_else_is_not_written(
    breakage, chat_model, tmp_path, one_device, monkeypatch
):
    model = with_adapter(chat_model, one_device)
    if breakage == "peft":
        monkeypatch.setattr(verify, "TORCH", 1e-9)
    else:
        write = export.write_adapter

        def wrong(directory, *arguments):
            write(directory, *arguments)
            if breakage == "scale":
                path = directory / "adapter_config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
            else:
                path = directory / "adapter_model.safetensors"
                tensors = load_file(path)
                key = next(key for key in tensors if "lora_B" in key)
                save_file(tensors | {key: tensors[key] * 1.01}, path)

        monkeypatch.setattr(export, "write_adapter", wrong)
    with pytest.raises(RunError, match="computes something else"):
        exported(tmp_path / "out", model, chat_model, one_device)
    assert list(tmp_path.iterdir()) == []


def test_an_export_verifies_on_a_base_that_was_stored_in_fewer_bits_than_its_file(
    chat_model, tmp_path, one_device
):
    source = resolve(str(chat_model))
    model = load_model(source, one_device, dtype="bfloat16")
    inject(model, LoRAConfig(4, 8.0), 0, one_device)
    result = export_adapter(
        tmp_path / "out", model, source, None, TEXTS, one_device, dtype="bfloat16", compute="auto"
    )
    assert result.torch_note is None
    assert result.torch_difference < 1e-3


def test_low_precision_base_keeps_float32_factors(tmp_path, one_device):
    tools.save_model(tmp_path / "base", tools.tiny_config(), dtype=torch.bfloat16)
    model = with_adapter(tmp_path / "base", one_device)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, "base")
    assert {
        value.dtype
        for value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    } == {np.dtype("float32")}
