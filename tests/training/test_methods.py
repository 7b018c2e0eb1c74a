"""Every method x accumulation x packing x mesh gives the same losses; what trains without an
adapter, and what that costs.
"""

import jax
import numpy as np
import pytest
import torch

from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.data.loader import on_devices
from tests.support import peft_side, tools
from tests.support.cases import thinned
from tests.support.preferences import answers, labels_of, side_by_side
from tests.support.steps import Steps, batch_of, leaves, ragged_batch, random_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHODS = {
    "dora": ["adapter.method=dora"],
    "pissa": ["adapter.init=pissa"],
    "nf4": ["model.dtype=nf4"],
    "int8 dora": ["model.dtype=int8", "adapter.method=dora"],
    "full": ["adapter.method=none", "optimizer.learning_rate=1e-3"],
    "last": ["adapter.method=none", "trainable=last:1"],
    "names": ["adapter.method=none", "trainable=[norms, layers.1.mlp, embeddings]"],
    "muon": ["optimizer.name=muon", "adapter.method=none"],
    "adafactor": ["optimizer.name=adafactor", "train.ema=0.9"],
    "distill": ["train.objective=distill", "distill.teacher={base}"],
    "dpo": ["train.objective=dpo"],
    "orpo": ["train.objective=orpo"],
    "simpo": ["train.objective=simpo", "adapter.method=none", "trainable=last:1"],
    "kto": ["train.objective=kto"],
}  # fmt: skip
PREFERENCES = ("dpo", "orpo", "simpo", "kto")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Rows of two blocks of NF4."""
    config = tools.tiny_config(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=4
    )
    return tools.save_model(tmp_path_factory.mktemp("base"), config)


def batches(name, packed):
    """Two batches of eight rows (packed: of as few as their examples fit in, and empty ones)."""
    result = []
    for seed in range(2):
        if name in PREFERENCES:
            labels = [part for _ in range(2) for part in labels_of(name)] + labels_of(name)[:4]
            result.append(side_by_side(answers(8, seed), labels, packed, 8))
        else:
            rows = random_rows(8, seed)
            result.append(batch_of(rows, 8, 64 if packed else None, packed))
    return result


@pytest.mark.parametrize("name", thinned(METHODS, "int8 dora"))
def test_accumulation_packing_and_mesh_change_no_loss(name, base):
    keys = [key.format(base=base) for key in METHODS[name]]

    def train(mesh, micro_batches=1, packed=False):
        return [
            step[:2]
            for step in Steps(base, mesh, *keys).train(batches(name, packed), micro_batches)
        ]

    single = make_mesh(devices=jax.devices()[:1])
    expected = train(single)
    np.testing.assert_allclose(train(single, micro_batches=4, packed=True), expected, rtol=2e-4)
    np.testing.assert_allclose(train(make_mesh(1, 2, 4), micro_batches=2), expected, rtol=2e-4)


def torch_steps(model, trains, batches, rate):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, metrics = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0), []
    for rows in batches:
        total, count = peft_side.token_loss(model, rows)
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics.append((float(total.detach()) / count, float(norm)))
    return metrics


SELECTIONS = {
    "all": ("all", lambda name: True),
    "last:2": ("last:2", lambda name: any(f"layers.{layer}." in name for layer in (1, 2))),
    "norms and biases": ("[norms, biases]", lambda name: "norm" in name or name.endswith("bias")),
    "embeddings": ("[embeddings]", lambda name: "embed_tokens" in name),
    "head and one layer's queries": (
        "[head, layers.1.self_attn.q_proj]",
        lambda name: "lm_head" in name or "layers.1.self_attn.q_proj" in name,
    ),
    "every down_proj": ("[down_proj]", lambda name: "down_proj" in name),
}


@pytest.mark.parametrize("name", thinned(SELECTIONS, "head and one layer's queries"))
def test_ten_steps_of_weights_equal_pytorchs(name, tmp_path, one_device):
    entries, trains = SELECTIONS[name]
    config = tools.tiny_config(attention_bias=True)
    tools.save_model(tmp_path, config)
    model = tools.random_model(config)
    start = {key: value.detach().numpy().copy() for key, value in model.named_parameters()}
    rows = [random_rows(4, seed, longest=20) for seed in range(10)]
    expected = torch_steps(model, trains, rows, 1e-3)
    run = Steps(
        tmp_path,
        one_device,
        "adapter.method=none",
        f"trainable={entries}",
        "optimizer.learning_rate=1e-3",
    )
    metrics = run.train([batch_of(part, length=20) for part in rows])
    np.testing.assert_allclose([step[:2] for step in metrics], expected, rtol=2e-3)
    end = {key: value.detach().numpy() for key, value in model.named_parameters()}
    trained = by_name(run)
    assert trained.keys() == {key for key in start if trains(key)}
    for key, value in trained.items():
        change = np.linalg.norm(end[key] - start[key])
        assert change > 0, key
        assert np.linalg.norm(value - end[key]) <= 2e-3 * change + 1e-7, key


def by_name(run):
    """The leaves that train, by Hugging Face's names, a layer each."""
    from flax import nnx

    from jaxtune.models.names import names_of

    values = {}
    for path, leaf in nnx.to_flat_state(run.state.trainable):
        stack, names = names_of(path, run.model().config)
        value = np.asarray(leaf.get_value())
        values |= dict(zip(names, value if stack else [value], strict=True))
    return values


def test_the_first_layers_have_no_backward_pass_where_only_the_last_train(tmp_path, one_device):
    """Of 6 layers the last 2: a third of the backward work and of the activations kept, whatever
    the head takes.
    """
    tools.save_model(tmp_path, tools.tiny_config(num_hidden_layers=6))
    batch = batch_of(random_rows(8), length=64)

    def measured(trainable, layers):
        run = Steps(
            tmp_path,
            one_device,
            "adapter.method=none",
            f"trainable={trainable}",
            "train.remat=none",
        )
        assert len(run.model().config.segments) == layers
        step = run.step.lower(run.state, run.frozen, on_devices(batch, 1, one_device)).compile()
        return step.memory_analysis().temp_size_in_bytes, len(jax.tree.leaves(run.state.opt_state))

    whole, few = measured("[layers]", 1), measured("last:2", 2)
    assert few[0] < 0.6 * whole[0]


def test_nothing_frozen_has_a_gradient_or_moments(base, one_device):
    run = Steps(base, one_device, "adapter.method=none", "trainable=[norms]")
    assert all("norm" in name for name in leaves(run.trainable))
    assert sum(leaf.size for leaf in jax.tree.leaves(run.state.opt_state)) <= 2 * sum(
        leaf.size for leaf in jax.tree.leaves(run.trainable)
    ) + len(jax.tree.leaves(run.state.opt_state))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[hed]", r"trainable: 'hed' fits no weight"),
        ("[biases]", r"trainable: 'biases' fits no weight"),
        ("'['", r"trainable: '\[' is not a regular expression"),
    ],
)
def test_entries_that_mean_nothing_are_refused(entries, message, base, one_device):
    with pytest.raises(UserError, match=message):
        Steps(base, one_device, "adapter.method=none", f"trainable={entries}")


@pytest.mark.parametrize("remat", thinned(["none", "dots", "full"], "full"))
@pytest.mark.parametrize(
    "keys",
    thinned([["model.dtype=nf4"], ["adapter.method=dora"]], ["adapter.method=dora"]),
    ids=["nf4", "dora"],
)
def test_every_b_learns_under_every_remat_policy(keys, remat, base, one_device):
    run = Steps(base, one_device, *keys, f"train.remat={remat}")
    run.train([ragged_batch(number) for number in range(2)])
    for name, value in leaves(run.state.trainable).items():
        if name.endswith("lora_B"):
            assert all(np.abs(layer).max() > 0 for layer in value), name
