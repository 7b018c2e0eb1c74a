"""Adapters as PEFT and others write them: they compute here what they compute in PEFT, or are
refused by the name of what is not implemented.
"""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from jaxtune.core.errors import UserError
from jaxtune.weights.load import load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import attach, open_adapter
from jaxtune.weights.source import OverriddenSource, resolve
from jaxtune.weights.vocabulary import resize_for_adapter
from tests.support import peft_side, tools

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS = np.random.default_rng(0).integers(0, 288, (2, 12))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tools.save_model(tmp_path_factory.mktemp("base"), tools.tiny_config())


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    config = tools.tiny_config(tie_word_embeddings=True)
    return tools.save_model(tmp_path_factory.mktemp("tied"), config)


def saved(directory, *, tied=False, **options):
    """Write an adapter of PEFT, moved away from its start, and return the directory."""
    config = tools.tiny_config(tie_word_embeddings=tied)
    model = peft_side.lora(tools.random_model(config), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def edit(directory, **keys):
    """Change keys of the configuration; those that are `...` are removed."""
    raw = json.loads((directory / CONFIG).read_text()) | keys
    kept = {key: value for key, value in raw.items() if value is not ...}
    (directory / CONFIG).write_text(json.dumps(kept))


def rename(directory, change):
    """Give the tensors of the file other names."""
    tensors = load_file(directory / WEIGHTS)
    save_file({change(name): value for name, value in tensors.items()}, directory / WEIGHTS)


def assert_as_in_peft(directory, base, mesh, *, tied=False):
    """Assert that base and adapter compute, attached and merged, what they do in PEFT, and not what
    the base does.
    """
    random = tools.random_model(tools.tiny_config(tie_word_embeddings=tied))
    untouched = tools.torch_logits(random, IDS)
    expected = tools.torch_logits(PeftModel.from_pretrained(random, directory).eval(), IDS)
    assert np.abs(expected - untouched).max() > 0.02
    adapter, source = open_adapter(directory), resolve(str(base))
    model = load_model(source, mesh)
    attach(model, adapter, mesh)
    np.testing.assert_allclose(model(IDS), expected, atol=1e-4 * np.abs(expected).max())
    tensors, raw = merged(source.tensors(), adapter, source.config_json())
    whole = load_model(OverriddenSource(source.name, source.path, source, raw, tensors), mesh)
    np.testing.assert_allclose(whole(IDS), expected, atol=1e-4 * np.abs(expected).max())


STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa, ranks and rsLoRA": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"v_proj": 3},
        "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
    },
    "olora, ranks": {
        "init_lora_weights": "OLoRA",
        "rank_pattern": {"up_proj": 2},
        "target_modules": ["o_proj", "up_proj"],
    },
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa, some layers": {
        "init_lora_weights": "pissa",
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_that_peft_takes_out_of_the_base_computes_the_same(
    name, base, tmp_path, one_device
):
    assert_as_in_peft(saved(tmp_path, **STARTS[name]), base, one_device)


@pytest.mark.parametrize(
    ("init", "mend"),
    [
        ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        ("loftq", "merge_and_unload"),
        ("a later one", "merge_and_unload"),
    ],
)
def test_a_start_that_cannot_be_repeated_is_refused_with_how_to_convert(init, mend, tmp_path):
    edit(saved(tmp_path), init_lora_weights=init)
    with pytest.raises(UserError, match=f"adapter_config.json: init_lora_weights '{init}'.*{mend}"):
        open_adapter(tmp_path)


def test_a_start_on_a_tied_head_or_a_quantized_base_is_refused(
    base, tied_base, tmp_path, one_device
):
    """PEFT takes the start of a tied head out of the embedding too."""
    saved(tmp_path, init_lora_weights="pissa", target_modules=["lm_head"])
    model = load_model(resolve(str(tied_base)), one_device)
    with pytest.raises(UserError, match=r"init_lora_weights: the start of lm_head cannot"):
        attach(model, open_adapter(tmp_path), one_device)
    saved(tmp_path, init_lora_weights="olora")
    model = load_model(resolve(str(base)), one_device, dtype="int8")
    with pytest.raises(UserError, match=r"a base that is quantized.*Convert the adapter in PEFT"):
        attach(model, open_adapter(tmp_path), one_device)


def as_torch_file(directory):
    torch.save(
        {name: torch.from_numpy(value) for name, value in load_file(directory / WEIGHTS).items()},
        directory / "adapter_model.bin",
    )
    (directory / WEIGHTS).unlink()


def with_adapter_name(directory):
    rename(
        directory,
        lambda name: (
            f"{name}.default"
            if "embedding" in name
            else name.replace(".weight", ".default.weight").replace(
                "magnitude_vector", "magnitude_vector.default.weight"
            )
        ),
    )


# What becomes of the options that the adapter is made with, and of its files.
WRITTEN = {
    "a file of PyTorch": ({}, as_torch_file),
    "with the adapter's name": ({"use_dora": True}, with_adapter_name),
    "a magnitude's weight": (
        {"use_dora": True},
        lambda where: rename(
            where, lambda name: name + ".weight" if name.endswith("vector") else name
        ),
    ),
    "a target without a module": ({"target_modules": ["q_proj", "c_attn"]}, None),
    "the inputs first": ({}, lambda where: edit(where, fan_in_fan_out=True)),
    "keys of an old version": (
        {},
        lambda where: edit(
            where, rank_pattern=..., alpha_pattern=..., use_rslora=..., use_dora=..., r=8
        ),
    ),
    "a whole number as a float": ({}, lambda where: edit(where, lora_alpha=8.0)),
    "names to the whole": (
        {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"]},
        None,
    ),
    "patterns": (
        {
            "rank_pattern": {r"^model\.layers\.1\..*(q|k)_proj": 3, "q_proj": 5, r"up_pro\w": 2},
            "alpha_pattern": {r"layers\.[02]\.mlp\.up_proj": 3, ".*v_proj": 7},
        },
        None,
    ),
    "the first pattern that fits": (
        {
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": 1,
            "layers_pattern": ["blocks", "layers"],
        },
        None,
    ),
    "an expression left out": (
        {"target_modules": r".*\.(q|v|down)_proj", "exclude_modules": r".*layers\.0\..*"},
        None,
    ),
    "tied to the embedding": (
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        None,
    ),
    "saved with the embedding": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        None,
    ),
}
TIED = ("tied to the embedding", "saved with the embedding")


@pytest.mark.parametrize("name", WRITTEN)
def test_what_peft_reads_computes_the_same(name, base, tied_base, tmp_path, one_device):
    options, change = WRITTEN[name]
    tied = name in TIED
    saved(tmp_path, tied=tied, **({"r": 8} | options))
    if change is not None:
        change(tmp_path)
    assert_as_in_peft(tmp_path, tied_base if tied else base, one_device, tied=tied)


REFUSED = {
    "lora_bias": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"hidden_size": 1},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 2},
    "alora_invocation_tokens": [5, 9],
    "an_option_of_later": "on",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_implemented_is_refused_by_its_key(key, tmp_path):
    edit(saved(tmp_path), **{key: REFUSED[key]})
    with pytest.raises(UserError, match=rf"adapter_config\.json: options .* implement: {key}"):
        open_adapter(tmp_path)


WRONG = {
    "r": [0, -1, 8.5, True, "8", [8], 2**40, None, ...],
    "lora_alpha": [0, -16, float("nan"), float("inf"), "16", [16], 10**400, None, ...],
    "lora_dropout": [-0.1, 1.5, float("nan"), "0"],
    "use_rslora": [1, "true"],
    "target_modules": [[], "", None, ..., 5, [5], "(q_proj"],
    "exclude_modules": ["*", 7],
    "modules_to_save": ["lm_head", [1]],
    "layers_to_transform": [-1, [0, -2], "all", [1.5], True],
    "layers_pattern": ["(", 3],
    "rank_pattern": [["q_proj"], {"q_proj": 0}, {"q_proj": 2.5}, {"(": 2}, {"q_proj": [4]}],
    "alpha_pattern": [{"q_proj": float("nan")}, {"q_proj": -1}, 5],
    "bias": ["some", True],
    "init_lora_weights": [3, ["pissa"]],
    "trainable_token_indices": ["all", [-1], [1.5], [5, 5], {"embed_tokens": 5}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_value_of_another_type_or_range_is_refused_with_its_key(
    key, value, small_adapter, tmp_path
):
    raw = {**small_adapter, key: value}
    raw = {key: value for key, value in raw.items() if value is not ...}
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} must be .*, not ") as error:
        open_adapter(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400


@pytest.fixture(scope="module")
def small_adapter(tmp_path_factory):
    """The configuration that PEFT writes."""
    return json.loads((saved(tmp_path_factory.mktemp("adapter")) / CONFIG).read_text())


@pytest.mark.parametrize("text", ["[]", "3", "{", '"LORA"'])
def test_a_configuration_that_is_no_object_is_refused(text, tmp_path):
    (tmp_path / CONFIG).write_text(text)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(UserError, match=r"adapter_config\.json (must hold one|is not valid) JSON"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    "keys", [{"r": 10**9}, {"r": 5}, {"rank_pattern": {"q_proj": 10**9}}], ids=str
)
def test_a_rank_that_the_tensors_have_not_is_refused_before_it_takes_memory(keys, tmp_path):
    edit(saved(tmp_path), **keys)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: .*lora_A.* the rank (10|5)"):
        open_adapter(tmp_path)


def test_a_rank_of_a_module_that_the_file_lacks_takes_no_memory(base, tmp_path, one_device):
    saved(tmp_path, target_modules=["q_proj"])
    edit(tmp_path, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 2**31 - 1})
    model = load_model(resolve(str(base)), one_device)
    with pytest.raises(UserError, match=r"missing: .*k_proj\.lora_A"):
        attach(model, open_adapter(tmp_path), one_device)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named(number, base, tmp_path, one_device):
    tensors = load_file(saved(tmp_path) / WEIGHTS)
    name = next(name for name in tensors if "layers.2" in name and "lora_B" in name)
    tensors[name][3, 1] = number
    save_file(tensors, tmp_path / WEIGHTS)
    adapter, source = open_adapter(tmp_path), resolve(str(base))
    with pytest.raises(UserError, match=rf"safetensors: {name} holds NaN or infinity"):
        attach(load_model(source, one_device), adapter, one_device)
    with pytest.raises(UserError, match=rf"safetensors: {name} holds NaN or infinity"):
        merged(source.tensors(), adapter, source.config_json())


def test_a_token_that_nobody_has_takes_no_memory(base, tmp_path):
    saved(tmp_path, target_modules=["q_proj"], trainable_token_indices=[5, 200])
    edit(tmp_path, trainable_token_indices=[5, 10**12])
    with pytest.raises(
        UserError, match=r"trainable_token_indices: there is no token 1000000000000"
    ):
        resize_for_adapter(resolve(str(base)), open_adapter(tmp_path))


@pytest.mark.parametrize("rows", [280, 296])
def test_other_rows_than_the_bases_are_refused_by_their_shape(rows, base, tmp_path, one_device):
    """PEFT refuses them too, until the base has been resized by hand."""
    saved(tmp_path, target_modules=["embed_tokens", "q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.embed_tokens"
    for end, axis in ((".base_layer.weight", 0), (".lora_embedding_A", 1)):
        tensors[name + end] = np.resize(
            tensors[name + end], [rows if at == axis else size for at, size in
                                  enumerate(tensors[name + end].shape)]
        )  # fmt: skip
    save_file(tensors, tmp_path / WEIGHTS)
    adapter = open_adapter(tmp_path)
    model = load_model(resolve(str(base)), one_device)
    with pytest.raises(UserError, match=rf"embed_tokens.* \[{rows}, 32\].*fewer tokens"):
        attach(model, adapter, one_device)
