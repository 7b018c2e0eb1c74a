"""Update rules against PyTorch's and transformers' own, and what belongs to them: decay, rates
of groups, averages, noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.optimization import Adafactor

from jaxtune.config.schema import OptimizerSection
from jaxtune.core.errors import UserError
from jaxtune.models.layers import Dropout
from jaxtune.training.optimizer import Leaf, auto_rate, build_optimizer, eval_params
from jaxtune.training.setup import Setup
from tests.support import tools
from tests.support.steps import Steps, leaves, ragged_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, RATE = 10, 1e-2
DETERMINISTIC = {"learning_rate": RATE, "schedule": "constant", "warmup": 0.0, "clip_norm": None}


def problem(seed=0):
    """`(parameters, gradients of each step)`: a stack of two matrices and a vector; the
    gradients depend on nothing.
    """
    random = np.random.default_rng(seed)
    shapes = {"matrix": (2, 160, 136), "vector": (2, 136)}
    parameters = {
        name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    return parameters, [
        {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        for _ in range(STEPS)
    ]


LEAVES = [
    Leaf(("a.q_proj",), "weight", 1, True, False),
    Leaf(("a.norm",), "weight", 1, False, False),
]


def ours(**numbers):
    """The parameters after the steps."""
    config = OptimizerSection(**(DETERMINISTIC | numbers))
    rule = build_optimizer(config, STEPS, LEAVES)
    parameters, gradients = problem()
    parameters = jax.tree.map(jnp.asarray, parameters)
    with jax.numpy_dtype_promotion("standard"):
        state = rule.init(parameters)
        for gradient in gradients:
            updates, state = rule.update(gradient, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
        return eval_params(config, state, parameters)


def theirs(make):
    """The same in PyTorch, each matrix and each vector a parameter."""
    start, gradients = problem()
    parts = {
        (name, number): torch.nn.Parameter(torch.tensor(start[name][number]))
        for name in start
        for number in range(2)
    }
    rules = make(
        [part for key, part in parts.items() if key[0] == "matrix"],
        [p for key, p in parts.items() if key[0] == "vector"],
    )
    for gradient in gradients:
        for (name, number), part in parts.items():
            part.grad = torch.tensor(gradient[name][number])
        for rule in rules:
            rule.step()
    return {
        name: np.stack([parts[name, number].detach().numpy() for number in range(2)])
        for name in start
    }


def groups(rule, **options):
    """Decay for matrices alone."""
    return lambda matrices, vectors: [
        rule(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=RATE,
            **options,
        )
    ]


RULES = {
    "adamw": (
        {"weight_decay": 0.1, "betas": [0.8, 0.95]},
        groups(torch.optim.AdamW, betas=(0.8, 0.95)),
    ),
    "sgd": ({"betas": [0.9, 0.0]}, lambda m, v: [torch.optim.SGD([*m, *v], lr=RATE, momentum=0.9)]),
    "adafactor": (
        {},
        lambda m, v: [
            Adafactor(
                [*m, *v],
                lr=RATE,
                scale_parameter=False,
                relative_step=False,
                warmup_init=False,
                eps=(1e-30, 1e-3),
            )
        ],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_ten_steps_equal_pytorchs(name):
    numbers, make = RULES[name]
    start, result, expected = problem()[0], ours(name=name, **numbers), theirs(make)
    for key, value in expected.items():
        change = np.linalg.norm(value - start[key])
        assert np.linalg.norm(result[key] - value) <= 2e-4 * change, key


def test_muon_is_its_algorithm_on_matrices_and_adamw_on_vectors():
    """Jordan et al. 2024, five Newton-Schulz steps on Nesterov's momentum, and the size of AdamW's
    updates (Liu et al. 2025, eq. 4).

    The momentum is bias-corrected, as optax has it; PyTorch's is not, and orthogonalizes in
    bfloat16, so it is no reference here.
    """
    parameters, gradients = problem()
    expected, momentum = parameters["matrix"].copy(), np.zeros_like(parameters["matrix"])
    for step, gradient in enumerate(gradients, 1):
        momentum = 0.95 * momentum + 0.05 * gradient["matrix"]
        mixed = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * gradient["matrix"] / (
            1 - 0.95**step
        )
        for layer, x in enumerate(mixed):
            x = x.T / np.linalg.norm(x)  # the wide side second
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            expected[layer] -= RATE * (0.2 * np.sqrt(160) * x.T + 0.1 * expected[layer])
    result = ours(name="muon", weight_decay=0.1, betas=[0.95, 0.999])
    assert np.linalg.norm(result["matrix"] - expected) <= 1e-3 * np.linalg.norm(
        expected - parameters["matrix"]
    )
    adamw = theirs(
        lambda m, v: [torch.optim.AdamW(v, lr=RATE, betas=(0.95, 0.999), weight_decay=0.0)]
    )
    assert np.linalg.norm(result["vector"] - adamw["vector"]) <= 1e-3 * np.linalg.norm(
        adamw["vector"] - parameters["vector"]
    )


def test_lion_is_its_algorithm():
    """Chen et al. 2023, algorithm 2."""
    parameters, gradients = problem()
    momentum = {name: np.zeros_like(value) for name, value in parameters.items()}
    for gradient in gradients:
        for name, g in gradient.items():
            decay = 0.1 * parameters[name] if name == "matrix" else 0.0
            parameters[name] = parameters[name] - RATE * (
                np.sign(0.9 * momentum[name] + 0.1 * g) + decay
            )
            momentum[name] = 0.99 * momentum[name] + 0.01 * g
    result = ours(name="lion", betas=[0.9, 0.99], weight_decay=0.1)
    for name, value in parameters.items():
        np.testing.assert_allclose(result[name], value, atol=1e-5)


def test_schedule_free_is_its_algorithm():
    """Defazio et al. 2024, algorithm 1: steps from z, gradients at y, and the average x that is
    evaluated.
    """
    start, gradients = problem()
    result = ours(name="schedule-free", betas=[0.9, 0.99])
    for name, x in start.items():
        z, second = x.copy(), np.zeros_like(x)
        for number, gradient in enumerate(gradients, 1):
            second = 0.99 * second + 0.01 * gradient[name] ** 2
            z = z - RATE * gradient[name] / (np.sqrt(second / (1 - 0.99**number)) + 1e-8)
            x = x + (z - x) / number  # the gradients here do not depend on y
        np.testing.assert_allclose(result[name], x, atol=2e-5)


def test_rates_of_groups_and_lora_plus():
    config = OptimizerSection(**DETERMINISTIC, name="sgd", betas=[0.0, 0.0], rates={"norm": 1e-3})
    rule = build_optimizer(config, STEPS, LEAVES)
    ones = {"matrix": jnp.ones((2, 3, 3)), "vector": jnp.ones((2, 3))}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = rule.update(ones, rule.init(ones), ones)
    np.testing.assert_allclose(updates["matrix"], -RATE, rtol=1e-6)
    np.testing.assert_allclose(updates["vector"], -1e-3, rtol=1e-6)
    with pytest.raises(
        UserError,
        match=r"optimizer.rates: 'nrm' matches nothing that trains; there are norm, q_proj",
    ):
        build_optimizer(config.model_copy(update={"rates": {"nrm": 1.0}}), STEPS, LEAVES)


def test_the_automatic_rate_is_the_published_rule():
    """LoRA Without Regret: 5e-5 x 10 x (2000 / hidden size) ^ 0.781 for Llama."""
    from jaxtune.models.families.from_hf import from_hf

    raw = tools.tiny_config(hidden_size=2048, num_attention_heads=32).to_dict()
    assert auto_rate(from_hf(raw, "config.json"), lora=True) == pytest.approx(
        5e-4 * (2000 / 2048) ** 0.781
    )
    assert auto_rate(from_hf(raw, "config.json"), lora=False) == pytest.approx(
        5e-5 * (2000 / 2048) ** 0.781
    )


def test_the_average_is_what_is_evaluated(chat_model, one_device):
    run = Steps(chat_model, one_device, "train.ema=0.5")
    expected = leaves(run.trainable)
    for number in range(4):
        run.train([ragged_batch(number)])
        share = 1 - min(0.5, (number + 1) / (number + 11))
        expected = {
            name: old + share * (leaves(run.state.trainable)[name] - old)
            for name, old in expected.items()
        }
    parts = (run.spec, run.trainable, run.frozen, run.optimizer)
    setup = Setup(run.config, one_device, None, None, *parts, None, None)
    for name, value in leaves(setup.eval_params(run.state)).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6)
        if "lora_B" in name:
            assert np.abs(value - leaves(run.state.trainable)[name]).max() > 1e-4


def test_neftune_noise_is_the_papers_and_is_off_in_evaluation(chat_model, one_device):
    """Uniform within alpha / sqrt(tokens x embed), on the embeddings of every row of its own
    length.
    """
    run = Steps(chat_model, one_device, "train.neftune=5", "optimizer.learning_rate=1e-12")
    model, batch = run.model(), ragged_batch()
    seen = []
    table = type(model.model)

    class Spy(Exception):
        pass

    def capture(self, x, *arguments):
        seen.append(np.asarray(x))
        raise Spy

    before, table.__call__ = table.__call__, capture
    try:
        for dropout in (Dropout(jax.vmap(jax.random.key)(np.arange(8))), None):
            with pytest.raises(Spy):
                model.hidden_states(
                    batch.input_ids,
                    segment_ids=batch.segment_ids,
                    positions=batch.positions,
                    dropout=dropout,
                    noise=5.0,
                )
    finally:
        table.__call__ = before
    noise, lengths = seen[0] - seen[1], (batch.segment_ids > 0).sum(axis=1)
    for row, length in enumerate(lengths):
        bound = 5 / np.sqrt(length * 32)
        largest = np.abs(noise[row, :length]).max()
        assert 0.8 * bound < largest <= bound * 1.0001
    same = [loss for loss, *_ in run.train([batch, batch])]
    assert same[0] != same[1]
    assert run.gradient(batch)[0] == Steps(chat_model, one_device).gradient(batch)[0]
