"""(IA)^3 beside PEFT: the same start, the same steps, the same export."""

import shutil

import chex
import jax
import numpy as np
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.numpy import load_file

from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.progress import Reporter
from jaxtune.training.methods import adopt_adapter
from jaxtune.weights.load import load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import attach, open_adapter, write_adapter
from jaxtune.weights.source import OverriddenSource, resolve
from jaxtune.workflows.train import run
from tests.support import peft_side, tools
from tests.support.steps import Steps, batch_of, random_rows, tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers):UserWarning"),
]

PAPER = "adapter.targets=[k_proj, v_proj, down_proj]"
KINDS = {
    "paper": [PAPER],
    "all linear": [],
    "regex": [r"adapter.targets=.*\.(0|2)\..*(v|down|up)_proj"],
    "excluded and saved": [
        PAPER,
        "adapter.exclude=[layers.1.self_attn.k_proj]",
        "adapter.modules_to_save=[lm_head, norm]",
    ],
    "head": ["adapter.targets=[lm_head, v_proj]"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with biases, which the scales of outputs scale too."""
    config = tools.tiny_config(attention_bias=True)
    return config, tools.save_model(tmp_path_factory.mktemp("base"), config)


def ia3_steps(directory, mesh, *keys, **options):
    """The step of a run with (IA)^3, which has no rank and alpha."""
    plain = ["adapter.method=ia3", "adapter.rank=16", "adapter.alpha=32"]
    return Steps(directory, mesh, *plain, *keys, **options)


def names_of_file(model):
    return {
        key.replace(".default", "").replace(".modules_to_save", ""): parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def scrambled(model):
    """The model with scales, and whatever else trains, away from where they begin."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in names_of_file(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", KINDS)
def test_loss_gradients_and_adamw_steps_equal_pefts(name, base, tmp_path, one_device):
    config, directory = base
    run = ia3_steps(directory, one_device, *KINDS[name])
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    untouched = load_model(resolve(str(directory)), one_device)(ids)
    chex.assert_trees_all_equal(run.model()(ids), untouched)

    write(run.model(), tmp_path / "start")
    reference = PeftModel.from_pretrained(
        tools.random_model(config), tmp_path / "start", is_trainable=True
    )
    parameters = names_of_file(reference)
    start = {key: value.detach().numpy().copy() for key, value in parameters.items()}
    chex.assert_trees_all_equal(tensors_of(run.model()), start)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    batches = [random_rows(4, seed, longest=20) for seed in range(3)]
    losses, gradients = [], None
    for rows in batches:
        total, count = peft_side.token_loss(reference, rows)
        (total / count).backward()
        gradients = gradients or {key: p.grad.numpy().copy() for key, p in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((float(total.detach()) / count, float(norm)))

    loss, gradient = run.gradient(batch_of(batches[0], length=20))
    assert float(loss) == pytest.approx(losses[0][0], rel=1e-5)
    ours = tensors_of(run.model(gradient))
    assert ours.keys() == gradients.keys()
    for key, value in gradients.items():
        chex.assert_equal_shape([ours[key], value])
        assert np.linalg.norm(ours[key] - value) <= 1e-3 * np.linalg.norm(value) + 1e-7, key

    steps = run.train([batch_of(rows, length=20) for rows in batches])
    np.testing.assert_allclose([step[:2] for step in steps], losses, rtol=2e-3)
    ours = tensors_of(run.exportable())
    for key, value in parameters.items():
        change = np.linalg.norm(value.detach().numpy() - start[key])
        assert change > 0, key
        assert np.linalg.norm(ours[key] - value.detach().numpy()) <= 2e-3 * change + 1e-7, key
    assert_exports(run.exportable(), base, tmp_path, ids, one_device)


def write(model, directory):
    directory.mkdir()
    write_adapter(directory, model, "base")


def assert_exports(model, base, tmp_path, ids, mesh):
    """What is written computes the same in PEFT, read again here, and merged into the base."""
    config, directory = base
    expected = np.asarray(model(ids))
    write(model, tmp_path / "end")
    again = PeftModel.from_pretrained(tools.random_model(config), tmp_path / "end").eval()
    np.testing.assert_allclose(tools.torch_logits(again, ids), expected, atol=2e-4)
    source, adapter = resolve(str(directory)), open_adapter(tmp_path / "end")
    fresh = load_model(source, mesh)
    attach(fresh, adapter, mesh)
    np.testing.assert_array_equal(fresh(ids), expected)
    tensors, raw = merged(source.tensors(), adapter, source.config_json())
    whole = load_model(OverriddenSource(source.name, source.path, source, raw, tensors), mesh)
    np.testing.assert_allclose(whole(ids), expected, atol=2e-4)


PEFT_VARIANTS = {
    "the family's own": {},
    "no feed-forward": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": []},
    "other feed-forward": {
        "target_modules": ["o_proj", "up_proj"],
        "feedforward_modules": ["up_proj"],
    },
    "regular expressions": {
        "target_modules": r".*\.1\..*(k|down|up)_proj",
        "feedforward_modules": r".*down_proj",
    },
    "saved": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", PEFT_VARIANTS)
def test_an_adapter_of_peft_computes_the_same_merges_the_same_and_comes_back(
    name, base, tmp_path, one_device
):
    config, directory = base
    options = IA3Config(task_type="CAUSAL_LM", **PEFT_VARIANTS[name])
    reference = scrambled(get_peft_model(tools.random_model(config), options))
    reference.save_pretrained(tmp_path / "adapter")
    model = load_model(resolve(str(directory)), one_device)
    attach(model, open_adapter(tmp_path / "adapter"), one_device)
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    np.testing.assert_allclose(model(ids), tools.torch_logits(reference, ids), atol=2e-4)
    assert_exports(model, base, tmp_path, ids, one_device)
    before, after = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("adapter", "end")
    )
    chex.assert_trees_all_equal(before, after)


def test_merged_weights_are_pefts(base, tmp_path):
    config, directory = base
    reference = scrambled(
        get_peft_model(tools.random_model(config), IA3Config(task_type="CAUSAL_LM"))
    )
    reference.save_pretrained(tmp_path / "adapter")
    source = resolve(str(directory))
    tensors, _ = merged(source.tensors(), open_adapter(tmp_path / "adapter"), source.config_json())
    for name, value in reference.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(tensors[name].all(), value.numpy(), rtol=1e-6, err_msg=name)


@pytest.mark.devices(8)
def test_the_mesh_and_micro_batches_change_nothing(base):
    batches = [batch_of(random_rows(8, seed), 8) for seed in range(2)]
    keys = [PAPER, "train.remat=dots"]
    whole = ia3_steps(base[1], make_mesh(devices=jax.devices()[:1]), *keys).train(batches)
    cut = ia3_steps(base[1], make_mesh(1, 2, 4), *keys).train(batches, micro_batches=2)
    np.testing.assert_allclose([s[:2] for s in cut], [s[:2] for s in whole], rtol=2e-4)


def settings(directory, model, *further):
    return load_config(
        overrides=[
            f"model.source={model}", "adapter.method=ia3", PAPER,
            f"data.train={tools.write_rows(directory / 'rows.jsonl', tools.sums(24))}",
            "data.max_length=64", "train.batch_size=8", "train.steps=4", "checkpoint.every=2",
            "optimizer.learning_rate=1e-2", f"run.dir={directory / 'run'}", *further,
        ]
    )  # fmt: skip


def test_a_run_exports_continues_and_resumes(chat_model, tmp_path, one_device):
    whole = run(settings(tmp_path, chat_model), Reporter(), fresh=True)
    assert whole.verification.torch_difference is not None  # PEFT has read it
    scales = {name: tensor.all() for name, tensor in open_adapter(whole.adapter).tensors.items()}
    assert all(np.abs(value - 1).max() > 1e-3 for value in scales.values())
    shutil.rmtree(whole.adapter)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("4*")
    shutil.rmtree(checkpoint)
    resumed = run(settings(tmp_path, chat_model), Reporter())
    again = {name: tensor.all() for name, tensor in open_adapter(resumed.adapter).tensors.items()}
    chex.assert_trees_all_equal(again, scales)

    start = f"adapter.init={resumed.adapter}"
    begun = Steps(chat_model, one_device, "adapter.method=ia3", start)
    chex.assert_trees_all_equal(tensors_of(begun.model()), scales)
    section = adopt_adapter(load_config(overrides=[start])).adapter
    assert (section.method, section.targets) == ("ia3", ["down_proj", "k_proj", "v_proj"])


MEANINGLESS = {
    "adapter.rank=8": "adapter.rank",
    "adapter.dropout=0.1 adapter.bias=all": "adapter.dropout, adapter.bias",
    "adapter.layers=last:1": "adapter.layers",
    "adapter.train_tokens=new": "adapter.train_tokens",
    "optimizer.lora_plus=16": "optimizer.lora_plus",
    "optimizer.learning_rate=auto": "optimizer.learning_rate=auto",
}


@pytest.mark.parametrize("keys", MEANINGLESS)
def test_keys_that_mean_nothing_to_it_are_refused(keys):
    config = load_config(overrides=["adapter.method=ia3", *keys.split()])
    with pytest.raises(UserError, match=f"method=ia3 has no use for {MEANINGLESS[keys]}. Remove"):
        adopt_adapter(config)


def test_what_it_cannot_do_is_refused(base, tmp_path, one_device):
    with pytest.raises(UserError, match=r"\(IA\)\^3 on the embedding is not supported"):
        ia3_steps(base[1], one_device, "adapter.targets=[embed_tokens]")
    options = IA3Config(
        task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=r".*\.1\..*"
    )
    get_peft_model(tools.random_model(base[0]), options).save_pretrained(tmp_path)
    model = load_model(resolve(str(base[1])), one_device)
    with pytest.raises(UserError, match=r"feedforward_modules: .* some layers of .*down_proj only"):
        attach(model, open_adapter(tmp_path), one_device)
