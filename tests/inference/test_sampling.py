"""Sampling against transformers' logits warpers, and the engine's promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import Sampling, SamplingArrays, choose
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick_compilation")]

LOGITS = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32) * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_k": 6, "top_p": 0.7},
        {"temperature": 0.5, "top_p": 0.9},
        {"min_p": 0.2},
        {"min_p": 0.1, "top_k": 8, "repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
    ],
)
def test_draws_follow_the_distribution_of_transformers(options):
    sampling = Sampling(**({"temperature": 1.3} | options))
    before = torch.tensor([[0, 3, 3, 7]])
    scores = torch.from_numpy(LOGITS.copy())
    scores = (
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(before, scores)
        if sampling.remembers
        else scores
    )
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    scores = TopKLogitsWarper(sampling.top_k)(None, scores) if sampling.top_k else scores
    scores = TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores
    scores = MinPLogitsWarper(sampling.min_p)(None, scores) if sampling.min_p else scores
    expected = torch.softmax(scores, -1).numpy()[0]
    keys = jax.random.split(jax.random.key(0), 20000)
    arrays = SamplingArrays.of([sampling] * len(keys), len(keys))
    seen = jnp.zeros((len(keys), 12), bool).at[:, [0, 3, 7]].set(True)
    drawn = np.asarray(choose(jnp.repeat(LOGITS, len(keys), axis=0), keys, arrays, seen))
    found = np.bincount(drawn, minlength=12) / len(keys)
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=0.015)


def test_temperature_zero_is_greedy():
    assert (
        choose(
            jnp.asarray(LOGITS),
            jax.random.split(jax.random.key(0), 1),
            SamplingArrays.of([Sampling()], 1),
        )
        == LOGITS.argmax()
    )


@pytest.fixture(scope="module")
def engine(chat_model, one_device):
    return Engine(load_model(resolve(str(chat_model)), one_device), [], batch=4)


PROMPTS = [list(range(40, 40 + size)) for size in (1, 5, 17, 33, 2)]


def test_a_ragged_batch_equals_each_prompt_alone(engine):
    together = engine.generate(PROMPTS, 12)
    assert together == [engine.generate([prompt], 12)[0] for prompt in PROMPTS]
    assert all(len(answer) == 12 for answer in together)


def test_a_shared_prefix_changes_nothing(engine):
    prompts = [[*range(100, 140), *tail] for tail in ([1], [2, 3, 4], [5, 6], [7])]
    assert engine.generate(prompts, 10) == [engine.generate([prompt], 10)[0] for prompt in prompts]


def test_greedy_equals_the_argmax_of_whole_forward_passes(engine, chat_model, one_device):
    model = load_model(resolve(str(chat_model)), one_device)
    ids = list(PROMPTS[2])
    for _ in range(6):
        ids.append(int(np.asarray(model([ids]))[0, -1].argmax()))
    assert engine.generate([PROMPTS[2]], 6)[0] == ids[len(PROMPTS[2]) :]


def test_it_ends_at_every_stop_token_and_leaves_it_out(engine, chat_model, one_device):
    answer = engine.generate([PROMPTS[2]], 12)[0]
    model = load_model(resolve(str(chat_model)), one_device)
    for stop in dict.fromkeys(answer):
        stopped = Engine(model, [999, stop]).generate([PROMPTS[2]], 12)[0]
        assert stopped == answer[: answer.index(stop)]


def test_seeds_repeat_and_differ_and_rows_differ(engine):
    def draw(seed):
        return engine.generate([PROMPTS[1]] * 3, 12, Sampling(temperature=1.5, seed=seed))

    assert draw(1) == draw(1) != draw(2)
    assert len({str(row) for row in draw(1)}) == 3


def test_scores_are_log_probabilities_of_the_whole_forward_pass(engine, chat_model, one_device):
    model = load_model(resolve(str(chat_model)), one_device)
    prompts, answers = PROMPTS[1:4], [[9], [8, 7, 6], [5, 4]]
    found, _ = engine.score(engine.prefill(prompts, 8), answers)
    for prompt, answer, score in zip(prompts, answers, found, strict=True):
        logs = np.asarray(jax.nn.log_softmax(model([prompt + answer])))[0]
        expected = sum(logs[len(prompt) - 1 + at, token] for at, token in enumerate(answer))
        assert score == pytest.approx(expected, abs=1e-4)
