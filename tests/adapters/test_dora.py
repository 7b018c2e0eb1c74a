"""DoRA beside PEFT where the published checkpoints are rough: rows of zeros, as 511 rows of an
o_proj of Llama 3.1 8B, which have no direction.
"""

import json

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.numpy import load_file, save_file

from jaxtune.adapters.dora import DoRAConfig
from jaxtune.adapters.inject import inject
from jaxtune.weights.load import load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import attach, entries, open_adapter, write_adapter
from jaxtune.weights.source import OverriddenSource, resolve
from tests.support import peft_side, tools
from tests.support.cases import thinned
from tests.support.steps import Steps, batch_of, random_rows

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS = np.random.default_rng(0).integers(0, 288, (2, 12))
ZERO = {
    "model.layers.0.self_attn.o_proj.weight": slice(3, 30),
    "model.layers.1.self_attn.o_proj.weight": slice(None),
    "model.layers.2.mlp.up_proj.weight": slice(0, 1),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model some of whose rows are zero."""
    directory = tools.save_model(tmp_path_factory.mktemp("base"), tools.tiny_config())
    tensors = load_file(directory / "model.safetensors")
    for name, rows in ZERO.items():
        tensors[name][rows] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def torch_base(base):
    model = tools.random_model(tools.tiny_config())
    state = {
        name: torch.from_numpy(value)
        for name, value in load_file(base / "model.safetensors").items()
    }
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize("steps", thinned([0, 3], 3))
def test_rows_of_zeros_train_and_compute_the_same_in_peft_and_merged(
    steps, base, tmp_path, one_device
):
    run = Steps(base, one_device, "adapter.method=dora")
    source = resolve(str(base))
    untouched = np.asarray(load_model(source, one_device)(IDS))
    np.testing.assert_allclose(run.model()(IDS), untouched, atol=2e-5)
    loss, gradient = run.gradient(batch_of(random_rows(4, 0, longest=20), length=20))
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    for number in range(steps):
        ((loss, norm, *_),) = run.train([batch_of(random_rows(4, number, longest=20), length=20)])
        assert np.isfinite([loss, norm]).all()

    model = run.exportable()
    expected = np.asarray(model(IDS))
    assert np.isfinite(expected).all()
    assert (np.abs(expected - untouched).max() > 1e-3) == (steps > 0)
    write_adapter(tmp_path, model, "base")
    peft = PeftModel.from_pretrained(torch_base(base), tmp_path).eval()
    np.testing.assert_allclose(tools.torch_logits(peft, IDS), expected, atol=2e-4)
    together = peft.merge_and_unload()
    tensors, raw = merged(source.tensors(), open_adapter(tmp_path), source.config_json())
    for name in ZERO:
        np.testing.assert_allclose(
            tensors[name].all(), together.state_dict()[name].numpy(), atol=1e-5
        )
    whole = load_model(OverriddenSource(source.name, source.path, source, raw, tensors), one_device)
    np.testing.assert_allclose(whole(IDS), expected, atol=2e-4)


def test_an_adapter_whose_rows_are_zero_is_read_as_zero(base, tmp_path, one_device):
    """PEFT begins with B = 0 there and divides zero by zero, whatever is loaded later."""
    config = DoRAConfig(rank=4, alpha=8.0)
    model = load_model(resolve(str(base)), one_device)
    inject(model, config, 0, one_device)
    write_adapter(tmp_path, model, "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v * (0 if "lora_B" in k else 1) for k, v in tensors.items()}, path)
    again = load_model(resolve(str(base)), one_device)
    untouched = np.asarray(again(IDS))
    attach(again, open_adapter(tmp_path), one_device)
    np.testing.assert_allclose(again(IDS), untouched, atol=2e-5)
    source = resolve(str(base))
    merged_tensors, _ = merged(source.tensors(), open_adapter(tmp_path), source.config_json())
    assert all(np.isfinite(merged_tensors[name].all()).all() for name in ZERO)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all", "modules_to_save": ["norm"]},
        {"bias": "lora_only", "use_dora": True, "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_lora_plus_raises_the_rates_that_it_raises_in_peft(options, tmp_path, one_device):
    config = tools.tiny_config(attention_bias=True)
    tools.save_model(tmp_path / "base", config)
    reference = peft_side.lora(tools.random_model(config), **options)
    reference.save_pretrained(tmp_path / "adapter")
    names = {
        id(value): peft_side.name_in_file(name) for name, value in reference.named_parameters()
    }
    groups = create_loraplus_optimizer(
        reference, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=16.0
    ).param_groups
    raised = {names[id(value)] for group in groups for value in group["params"] if group["lr"] > 1}
    model = load_model(resolve(str(tmp_path / "base")), one_device)
    attach(model, open_adapter(tmp_path / "adapter"), one_device)
    ours = {
        entry.name for entry in entries(model) if entry.variable.get_metadata().get("lora_plus")
    }
    assert ours == raised
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
