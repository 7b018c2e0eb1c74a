"""The step: accumulation, optimizer precision, remat, schedule, dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from jaxtune.config.schema import OptimizerSection
from jaxtune.core.mesh import make_mesh
from jaxtune.data.loader import on_devices
from jaxtune.training.optimizer import learning_rate_schedule
from jaxtune.training.step import eval_step
from tests.support.cases import thinned
from tests.support.steps import Steps, leaves, ragged_batch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick_compilation")]


def train(run, steps=3, micro_batches=1, batch=ragged_batch):
    """`([(loss, gradient norm)], the adapter)` of a run from its start."""
    run.state = run.fresh()
    metrics = run.train([batch(number) for number in range(steps)], micro_batches)
    return [step[:2] for step in metrics], leaves(run.state.trainable)


def assert_same(left, right, tolerance):
    np.testing.assert_allclose(left[0], right[0], rtol=tolerance)
    chex.assert_trees_all_close(left[1], right[1], rtol=1e-7, atol=tolerance)


@pytest.mark.parametrize("dropout", thinned([0.0, 0.3], 0.3))
@pytest.mark.parametrize("micro_batches", thinned([2, 4, 8], 4))
def test_accumulation_equals_the_big_batch(micro_batches, dropout, chat_model, one_device):
    run = Steps(chat_model, one_device, f"adapter.dropout={dropout}")
    assert_same(train(run, micro_batches=micro_batches), train(run), 2e-5)


@pytest.mark.devices(8)
@pytest.mark.parametrize("shape", thinned([(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], (2, 2, 2)))
def test_no_mesh_changes_the_numbers(shape, chat_model, one_device):
    """Dropout is on: its draws, too, are the same on every mesh."""
    alone = train(Steps(chat_model, one_device, "adapter.dropout=0.3"))
    assert_same(train(Steps(chat_model, make_mesh(*shape), "adapter.dropout=0.3")), alone, 2e-5)


@pytest.mark.parametrize(
    "keys",
    [
        ["train.remat=dots"],
        ["adapter.method=dora", "adapter.dropout=0.1"],
        ["adapter.method=ia3"],
        ["adapter.method=none"],
        ["model.dtype=int8"],
    ],
    ids=lambda keys: keys[0],
)
def test_products_of_float32_are_asked_for_in_float32(keys, chat_model, one_device):
    """By itself a GPU would compute them in TF32, a TPU in bfloat16, where no test on a CPU sees
    it.
    """
    run = Steps(chat_model, one_device, "model.compute_dtype=float32", *keys)
    batch = on_devices(ragged_batch(0), 1, one_device)
    with jax.set_mesh(one_device):
        trace = run.step.trace(run.state, run.frozen, batch).jaxpr
    products = [
        equation for equation in equations(trace) if equation.primitive.name.endswith("dot_general")
    ]
    assert len(products) > 20
    for equation in products:
        if equation.invars[0].aval.dtype == jnp.float32:
            assert set(equation.params["precision"] or ()) == {jax.lax.Precision.HIGHEST}, equation


def equations(trace):
    """All equations of a trace, those inside others too."""
    for equation in trace.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("keys", [[], ["adapter.method=none"]], ids=["adapter", "weights"])
def test_trainable_leaves_and_moments_are_float32_and_tiny_updates_last(
    keys, chat_model, one_device
):
    """The base is stored in bfloat16; what trains of it is not."""
    run = Steps(
        chat_model,
        one_device,
        "optimizer.learning_rate=1e-6",
        "model.dtype=bfloat16",
        "train.ema=0.9",
        *keys,
    )
    kept = jax.tree.leaves((run.state.trainable, run.state.opt_state, run.state.average))
    assert all(
        leaf.dtype == jnp.float32 for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)
    )
    before = leaves(run.trainable)
    _, after = train(run, steps=1)
    for name, value in after.items():
        if "lora_A" not in name:
            moved = np.abs(value - before[name])
            assert 0 < moved.max() < 2e-6, name


@pytest.mark.parametrize("remat", thinned(["none", "dots", "full", "offload"], "full"))
def test_every_b_learns_under_every_remat_policy(remat, chat_model, one_device):
    run = Steps(chat_model, one_device, f"train.remat={remat}")
    result = train(run)
    for name, value in result[1].items():
        if name.endswith("lora_B"):
            assert all(np.abs(layer).max() > 0 for layer in value), name
    assert_same(result, train(Steps(chat_model, one_device, "train.remat=none")), 2e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_is_transformers_after_an_exact_warmup(kind, warmup):
    import torch

    steps = 20
    reference = {
        "cosine": get_cosine_schedule_with_warmup,
        "linear": get_linear_schedule_with_warmup,
    }[kind]
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    reference_rate = reference(sgd, warmup, steps).lr_lambdas[0]
    rate = learning_rate_schedule(
        OptimizerSection(learning_rate=3e-4, schedule=kind, warmup=float(warmup)), steps
    )
    for index in range(warmup):
        assert float(rate(index)) == pytest.approx(3e-4 * (index + 1) / warmup)
    for index in range(warmup, steps):
        assert float(rate(index)) == pytest.approx(
            3e-4 * reference_rate(index), rel=1e-5, abs=1e-12
        )
    assert float(rate(0)) > 0
    assert float(rate(steps - 1)) > 0


def test_wsd_and_constant_and_fraction():
    wsd = learning_rate_schedule(
        OptimizerSection(learning_rate=1.0, schedule="wsd", warmup=0.1), 20
    )
    assert [round(float(wsd(index)), 3) for index in (0, 1, 2, 15, 16, 17, 19)] == [
        0.5,
        1,
        1,
        1,
        1,
        0.75,
        0.25,
    ]
    constant = learning_rate_schedule(
        OptimizerSection(learning_rate=1.0, schedule="constant", warmup=0.0), 20
    )
    assert {float(constant(index)) for index in range(20)} == {1.0}


def test_the_schedule_counts_optimizer_steps_not_micro_steps(chat_model, one_device):
    run = Steps(chat_model, one_device, "optimizer.schedule=linear")
    assert_same(train(run, steps=4, micro_batches=4), train(run, steps=4), 2e-5)


def test_dropout_differs_by_step_and_row_and_is_off_in_evaluation(chat_model, one_device):
    from jaxtune.models.layers import Dropout

    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    kept = np.asarray(Dropout(keys)(jnp.ones((4, 6, 50)), 0.4, "q_proj"))
    assert np.unique(kept).size == 2
    assert abs((kept > 0).mean() - 0.6) < 0.05
    assert kept.mean() == pytest.approx(1.0, abs=0.1)
    assert not np.array_equal(kept[0], kept[1])
    other = np.asarray(Dropout(keys)(jnp.ones((4, 6, 50)), 0.4, "k_proj"))
    assert not np.array_equal(kept, other)

    run = Steps(chat_model, one_device, "adapter.dropout=0.5", "optimizer.learning_rate=1e-12")
    losses = [step[0] for step in train(run, batch=lambda number: ragged_batch(0))[0]]
    run.trainable = jax.tree.map(
        lambda leaf: leaf + 0.1, run.trainable
    )  # the weights stand still, so only the draws differ
    stepped = [train(run, steps=2, batch=lambda number: ragged_batch(0))[0] for _ in range(2)]
    assert stepped[0] == stepped[1]
    evaluate = eval_step(run.spec)
    results = {float(evaluate(run.trainable, run.frozen, ragged_batch(0))[0]) for _ in range(3)}
    without = eval_step(Steps(chat_model, one_device).spec)
    assert results == {float(without(run.trainable, run.frozen, ragged_batch(0))[0])}
    assert len(set(losses)) == 1  # B is zero, so dropping the adapter's input changes nothing yet
    assert stepped[0][0] != stepped[0][1]


def test_only_trainable_leaves_are_differentiated_and_returned(chat_model, one_device):
    """No array of a frozen weight's stacked shape leaves the step, and the optimizer holds none."""
    run = Steps(chat_model, one_device)
    shapes = {leaf.shape for leaf in jax.tree.leaves(run.frozen) if leaf.ndim > 1}
    out = jax.eval_shape(run.step, run.state, run.frozen, on_devices(ragged_batch(), 1, one_device))
    assert not shapes & {leaf.shape for leaf in jax.tree.leaves(out)}
