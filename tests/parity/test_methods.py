"""Every kind of adapter beside PEFT: the same start, the same ten steps, the same export."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from jaxtune.adapters.inject import exportable
from jaxtune.models.layers import Dropout
from jaxtune.weights.load import load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import open_adapter, write_adapter
from jaxtune.weights.source import OverriddenSource, resolve
from tests.support import peft_side, tools
from tests.support.cases import thinned
from tests.support.peft_side import assert_close, name_in_file
from tests.support.steps import Steps, batch_of, random_rows, tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers):UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"
    ),  # of PEFT's conversion, not used here
]

STEPS, RATE = 10, 5e-3
KINDS = {
    "lora": [],
    "rslora": ["adapter.rslora=true"],
    "dora": ["adapter.method=dora"],
    "lora+": ["optimizer.lora_plus=16", "optimizer.learning_rate=5e-4"],
    "ranks": [
        "adapter.rank_pattern={down_proj: 6, layers.1.self_attn.q_proj: 2}",
        "adapter.alpha_pattern={q_proj: 3}",
    ],
    "layers": ["adapter.layers=last:2", "adapter.targets=[q_proj, down_proj]"],
    "dora in some layers": [
        "adapter.method=dora",
        "adapter.layers=[0, 2]",
        "adapter.targets=[v_proj, up_proj]",
    ],
    "excluded": ["adapter.exclude=[k_proj, layers.1.mlp.up_proj]"],
    "embedding": ["adapter.targets=[embed_tokens, q_proj]"],
    "head": ["adapter.targets=[lm_head, q_proj]"],
    "saved": ["adapter.targets=[q_proj]", "adapter.modules_to_save=[lm_head, embed_tokens]"],
    "bias": ["adapter.bias=all"],
}
NOT_EXACT = {"dora", "dora in some layers"}  # m / |W| is 1 but for its rounding, in PEFT too


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = tools.tiny_config(attention_bias=True)
    return config, tools.save_model(tmp_path_factory.mktemp("base"), config)


def batches():
    return [random_rows(4, seed, longest=20) for seed in range(STEPS)]


def peft_steps(model, name, rate):
    """`[(loss, gradient norm)]` of PEFT's model, and the gradients of the first step."""
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
    if name == "lora+":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16, weight_decay=0.0
        )
    steps, gradients = [], {}
    for rows in batches():
        total, count = peft_side.token_loss(model, rows)
        (total / count).backward()
        gradients = gradients or {
            name_in_file(key): value.grad.numpy().copy() for key, value in parameters.items()
        }
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((float(total.detach()) / count, float(norm)))
    return steps, gradients


@pytest.mark.parametrize("name", thinned(KINDS, "lora", "dora", "saved"))
def test_forward_gradients_and_ten_steps_equal_pefts(name, base, tmp_path, one_device):
    config, directory = base
    keys = [f"optimizer.learning_rate={RATE}", *KINDS[name]]
    run = Steps(directory, one_device, *keys, steps=STEPS)
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    begin = np.asarray(run.model()(ids))
    untouched = np.asarray(load_model(resolve(str(directory)), one_device)(ids))
    if name in NOT_EXACT:
        np.testing.assert_allclose(begin, untouched, atol=2e-5)
    else:
        np.testing.assert_array_equal(begin, untouched)

    written(run.model(), tmp_path / "start")
    reference = PeftModel.from_pretrained(
        tools.random_model(config), tmp_path / "start", is_trainable=True
    )
    start = {
        name_in_file(key): value.detach().numpy().copy()
        for key, value in reference.named_parameters()
        if value.requires_grad
    }
    peft, gradients = peft_steps(reference, name, run.config.optimizer.learning_rate)
    rows = batches()
    loss, gradient = run.gradient(batch_of(rows[0], length=20))
    assert float(loss) == pytest.approx(peft[0][0], rel=1e-5)
    assert_close(tensors_of(run.model(gradient)), gradients, 1e-3)

    ours = run.train([batch_of(part, length=20) for part in rows])
    np.testing.assert_allclose([step[:2] for step in ours], peft, rtol=2e-3)
    end = {
        name_in_file(key): value.detach().numpy()
        for key, value in reference.named_parameters()
        if value.requires_grad
    }
    assert_close(tensors_of(run.exportable()), end, 2e-3, start)

    np.testing.assert_allclose(
        run.exportable()(ids), tools.torch_logits(reference.eval(), ids), atol=2e-3
    )
    reloads_and_merges(run.exportable(), config, directory, tmp_path, ids, one_device)


def written(model, directory):
    directory.mkdir()
    write_adapter(directory, model, "base")


def reloads_and_merges(model, config, directory, tmp_path, ids, mesh):
    """What was exported computes the same in PEFT, and merged into the base."""
    expected = np.asarray(model(ids))
    written(model, tmp_path / "end")
    again = PeftModel.from_pretrained(tools.random_model(config), tmp_path / "end").eval()
    np.testing.assert_allclose(tools.torch_logits(again, ids), expected, atol=2e-4)
    source = resolve(str(directory))
    tensors, raw = merged(source.tensors(), open_adapter(tmp_path / "end"), source.config_json())
    whole = load_model(OverriddenSource(source.name, source.path, source, raw, tensors), mesh)
    np.testing.assert_allclose(whole(ids), expected, atol=2e-4)


@pytest.mark.parametrize(
    "keys",
    thinned([[], ["adapter.rslora=true", "adapter.rank_pattern={q_proj: 2}"]], []),
    ids=["plain", "rslora"],
)
def test_pissa_begins_as_the_base_trains_as_pefts_and_its_export_is_what_was_trained(
    keys, base, tmp_path, one_device
):
    """Singular vectors have no sign, so what is compared of the factors is their product."""
    from peft import LoraConfig

    config, directory = base
    run = Steps(
        directory,
        one_device,
        f"optimizer.learning_rate={RATE}",
        "adapter.init=pissa",
        *keys,
        steps=STEPS,
    )
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    np.testing.assert_array_equal(
        run.model()(ids), load_model(resolve(str(directory)), one_device)(ids)
    )
    patterns = {"use_rslora": True, "rank_pattern": {"q_proj": 2}} if keys else {}
    options = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights="pissa",
        task_type="CAUSAL_LM",
        **patterns,
    )
    reference = get_peft_model(tools.random_model(config), options)
    begin = products(
        {
            key: value.detach().numpy().copy()
            for key, value in reference.named_parameters()
            if "lora_" in key
        }
    )
    peft, _ = peft_steps(reference, "pissa", RATE)
    rows = batches()
    ours = run.train([batch_of(part, length=20) for part in rows])
    np.testing.assert_allclose([step[:2] for step in ours], peft, rtol=2e-3)
    end = products(
        {
            key: value.detach().numpy()
            for key, value in reference.named_parameters()
            if "lora_" in key
        }
    )
    whole = products(
        tensors_of(run.exportable())
    )  # twice the rank: B A - B0 A0, which is what the run changed
    assert whole.keys() == end.keys()
    for key, value in end.items():
        change = value - begin[key]
        assert np.linalg.norm(whole[key] - change) <= 5e-3 * np.linalg.norm(change), key
    reloads_and_merges(run.exportable(), config, directory, tmp_path, ids, one_device)
    assert exportable(run.model(run.trainable)).adapter.rank == 8


def products(factors):
    """B A of every module."""
    named = {name_in_file(key): value for key, value in factors.items()}
    return {
        key: named[key.replace("lora_A", "lora_B")] @ value
        for key, value in named.items()
        if "lora_A" in key
    }


def test_the_magnitudes_of_dora_train_and_are_exported(base, tmp_path, one_device):
    run = Steps(base[1], one_device, "adapter.method=dora")
    before = tensors_of(run.model())
    run.train([batch_of(rows) for rows in batches()[:3]])
    after = tensors_of(run.exportable())
    for key, value in after.items():
        if "magnitude" in key:
            assert np.abs(value - before[key]).max() > 1e-3, key
    written(run.exportable(), tmp_path / "end")
    adapter = open_adapter(tmp_path / "end")
    assert adapter.config.method == "dora"
    assert sum("magnitude" in name for name in adapter.tensors) == 21


def test_dora_with_dropout_is_pefts_formula(base, one_device):
    """W sees the dropped input where the row is stretched, as in PEFT: y = W x + (s - 1) W d(x)
    + s B A d(x), s = m / |W + B A|.
    """
    run = Steps(
        base[1],
        one_device,
        "adapter.method=dora",
        "adapter.dropout=0.5",
        "adapter.targets=[up_proj]",
    )
    layer = run.model().model.layers[0].mlp.up_proj
    shift = jax.tree.map(
        lambda leaf: leaf + 0.1,
        (layer.lora_A[...], layer.lora_B[...], layer.lora_magnitude_vector[...]),
    )
    a, b, m = (np.asarray(part[0]) for part in shift)
    weight, keys = np.asarray(layer.weight[...][0]), jax.vmap(jax.random.key)(np.arange(2))
    graph, state = nnx.split(layer)
    first = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    first.lora_A.set_value(a), first.lora_B.set_value(b), first.lora_magnitude_vector.set_value(m)
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    dropped = np.asarray(Dropout(keys)(x, 0.5, layer.spec.name))
    changed = weight + 2 * b @ a
    stretch = m / np.linalg.norm(changed, axis=1)
    expected = (
        x @ weight.T + (stretch - 1) * (dropped @ weight.T) + stretch * (2 * dropped @ a.T @ b.T)
    )
    np.testing.assert_allclose(first(x, Dropout(keys)), expected, atol=1e-4)
