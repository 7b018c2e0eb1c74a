"""Traps of the step: accumulation, optimizer precision, remat, schedule, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from jaxtune.adapters.config import LoRAConfig
from jaxtune.adapters.inject import inject, split_trainable
from jaxtune.config.schema import OptimizerSection
from jaxtune.core.mesh import make_mesh
from jaxtune.data.loader import on_devices
from jaxtune.objectives.sft import Batch, sft
from jaxtune.train.optim import optimizer, schedule
from jaxtune.train.step import eval_step, init_state, train_step
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, LENGTH = 8, 24


def ragged_batch(seed=0):
    """Rows whose supervised share differs widely, which averaging of averages gets wrong."""
    random = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    lengths = random.integers(3, LENGTH, ROWS)
    inside = np.arange(LENGTH)[None] < lengths[:, None]
    weights = (inside & (random.random(shape) < np.linspace(0.1, 1, ROWS)[:, None])).astype(np.float32)
    weights[:, 1] = 1
    ids = random.integers(0, 256, (ROWS, LENGTH + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    return Batch(ids[:, :-1], ids[:, 1:], weights, inside.astype(np.int32), positions)


class Run:
    """A model with an adapter and its step."""

    def __init__(self, directory, mesh, *, dropout=0.0, remat="none", **options):
        self.mesh = mesh
        model = load_model(resolve(str(directory)), mesh)
        inject(model, LoRAConfig(4, 8.0, dropout), 0, mesh)
        self.graph, self.trainable, self.frozen = split_trainable(model)
        self.optimizer = optimizer(
            OptimizerSection(**({"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"} | options)), 10
        )
        self.step = train_step(self.graph, sft, self.optimizer, remat, dropout > 0)
        self.state = init_state(jax.tree.map(jnp.copy, self.trainable), self.optimizer, 0)

    def train(self, steps=3, cuts=1, batches=None):
        state, found = self.state, []
        with jax.set_mesh(self.mesh):
            for number in range(steps):
                batch = (batches or ragged_batch)(number)
                state, metrics = self.step(jax.tree.map(jnp.copy, state), self.frozen, on_devices(batch, cuts, self.mesh))
                found.append((float(metrics.loss), float(metrics.grad_norm)))
        return found, factors(state.trainable)


def factors(state):
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def assert_same(left, right, tolerance):
    np.testing.assert_allclose(left[0], right[0], rtol=tolerance)
    for name, value in left[1].items():
        np.testing.assert_allclose(value, right[1][name], atol=tolerance, err_msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("cuts", [2, 4, 8])
def test_trap01_accumulation_equals_the_big_batch(cuts, dropout, chat_model, one_device):
    run = Run(chat_model, one_device, dropout=dropout)
    assert_same(run.train(cuts=cuts), run.train(cuts=1), 2e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_trap01_trap26_no_mesh_changes_the_numbers(shape, chat_model, one_device):
    """Dropout is on: its draws, too, are the same on every mesh."""
    alone = Run(chat_model, one_device, dropout=0.3).train()
    assert_same(Run(chat_model, make_mesh(*shape), dropout=0.3).train(), alone, 2e-5)


def test_trap13_trainable_leaves_and_moments_are_float32_and_tiny_updates_last(chat_model, one_device):
    run = Run(chat_model, one_device, learning_rate=1e-6)
    run.frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), run.frozen)
    leaves = jax.tree.leaves((run.state.trainable, run.state.opt_state))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    before = factors(run.trainable)
    _, after = run.train(steps=1)
    for name, value in after.items():
        if "lora_A" not in name:
            moved = np.abs(value - before[name])
            assert 0 < moved.max() < 2e-6, name


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_trap21_every_b_learns_under_every_remat_policy(remat, chat_model, one_device):
    run = Run(chat_model, one_device, remat=remat)
    found = run.train()
    for name, value in found[1].items():
        if name.endswith("lora_B"):
            assert all(np.abs(layer).max() > 0 for layer in value), name
    assert_same(found, Run(chat_model, one_device).train(), 2e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_trap23_schedule_is_transformers_after_an_exact_warmup(kind, warmup):
    import torch

    steps = 20
    reference = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[kind]
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = reference(sgd, warmup, steps).lr_lambdas[0]
    ours = schedule(OptimizerSection(learning_rate=3e-4, schedule=kind, warmup=float(warmup)), steps)
    for index in range(warmup):
        assert float(ours(index)) == pytest.approx(3e-4 * (index + 1) / warmup)
    for index in range(warmup, steps):
        assert float(ours(index)) == pytest.approx(3e-4 * theirs(index), rel=1e-5, abs=1e-12)
    assert float(ours(0)) > 0
    assert float(ours(steps - 1)) > 0


def test_trap23_wsd_and_constant_and_fraction():
    wsd = schedule(OptimizerSection(learning_rate=1.0, schedule="wsd", warmup=0.1), 20)
    assert [round(float(wsd(index)), 3) for index in (0, 1, 2, 15, 16, 17, 19)] == [0.5, 1, 1, 1, 1, 0.75, 0.25]
    constant = schedule(OptimizerSection(learning_rate=1.0, schedule="constant", warmup=0.0), 20)
    assert {float(constant(index)) for index in range(20)} == {1.0}


def test_trap23_the_schedule_counts_optimizer_steps_not_micro_steps(chat_model, one_device):
    run = Run(chat_model, one_device, schedule="linear")
    assert_same(run.train(steps=4, cuts=4), run.train(steps=4, cuts=1), 2e-5)


def test_trap26_dropout_differs_by_step_and_row_and_is_off_in_evaluation(chat_model, one_device):
    from jaxtune.models.layers import Dropout

    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    kept = np.asarray(Dropout(keys)(jnp.ones((4, 6, 50)), 0.4, "q_proj"))
    assert np.unique(kept).size == 2
    assert abs((kept > 0).mean() - 0.6) < 0.05
    assert kept.mean() == pytest.approx(1.0, abs=0.1)
    assert not np.array_equal(kept[0], kept[1])
    other = np.asarray(Dropout(keys)(jnp.ones((4, 6, 50)), 0.4, "k_proj"))
    assert not np.array_equal(kept, other)

    run = Run(chat_model, one_device, dropout=0.5, learning_rate=1e-12)
    losses = [loss for loss, _ in run.train(steps=3, batches=lambda number: ragged_batch(0))[0]]
    warm = Run(chat_model, one_device, dropout=0.5, learning_rate=1e-12)  # the weights stand still, so only the draws differ
    warm.state = warm.state._replace(trainable=jax.tree.map(lambda leaf: leaf + 0.1, warm.state.trainable))
    stepped = [warm.train(steps=2, batches=lambda number: ragged_batch(0))[0] for _ in range(2)]
    assert stepped[0] == stepped[1]
    evaluate = eval_step(run.graph, sft)
    results = {float(evaluate(warm.state.trainable, run.frozen, ragged_batch(0))[0]) for _ in range(3)}
    without = eval_step(Run(chat_model, one_device).graph, sft)
    assert results == {float(without(warm.state.trainable, run.frozen, ragged_batch(0))[0])}
    assert len(set(losses)) == 1  # B is zero, so dropping the adapter's input changes nothing yet
    assert stepped[0][0] != stepped[0][1]


def test_only_trainable_leaves_are_differentiated_and_returned(chat_model, one_device):
    """No array of a frozen weight's stacked shape leaves the step, and the optimizer holds none."""
    run = Run(chat_model, one_device)
    shapes = {leaf.shape for leaf in jax.tree.leaves(run.frozen) if leaf.ndim > 1}
    out = jax.eval_shape(run.step, run.state, run.frozen, on_devices(ragged_batch(), 1, one_device))
    assert not shapes & {leaf.shape for leaf in jax.tree.leaves(out)}
