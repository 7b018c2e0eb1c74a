"""Continuous batching: each answer is what it is alone, whatever shares the rows; stop strings,
log-probabilities, streaming.
"""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.inference import programs
from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.text import TextGenerator
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools
from tests.support.cases import thinned

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick_compilation")]

RANDOM = np.random.default_rng(3)
PROMPTS = [
    RANDOM.integers(0, 256, size).tolist() for size in (3, 40, 9, 1, 25, 17, 60, 5, 12, 2, 33)
]


@pytest.fixture(scope="module")
def model(chat_model, one_device):
    return load_model(resolve(str(chat_model)), one_device)


@pytest.fixture(scope="module")
def alone(model):
    """Answers of unequal lengths: some end at a stop token, the others at twenty tokens."""
    engine = Engine(model, STOPS, batch=1)
    return [engine.answers([prompt], 20)[0] for prompt in PROMPTS]


STOPS = list(range(0, 288, 24))


@pytest.mark.parametrize("rows", thinned([1, 2, 4, 16], 4))
def test_more_prompts_than_rows(model, alone, rows):
    found = Engine(model, STOPS, batch=rows).answers(PROMPTS, 20)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in alone]
    assert [answer.end for answer in found] == [answer.end for answer in alone]
    assert {"stop", "length"} == {answer.end for answer in alone}
    for mine, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(mine.log_probs, other.log_probs, atol=1e-4)


@pytest.mark.devices(8)
def test_on_a_mesh(chat_model, alone):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        found = Engine(load_model(resolve(str(chat_model)), mesh), STOPS, batch=4).answers(
            PROMPTS, 20
        )
    assert [answer.tokens for answer in found] == [answer.tokens for answer in alone]


def test_draws_depend_on_the_prompts_place_alone(model):
    sampling = Sampling(temperature=1.2, top_k=40, min_p=0.02, repetition_penalty=1.2, seed=4)
    found = [
        answer.tokens for answer in Engine(model, STOPS, batch=4).answers(PROMPTS, 20, sampling)
    ]
    assert found == [
        answer.tokens for answer in Engine(model, STOPS, batch=2).answers(PROMPTS, 20, sampling)
    ]
    assert found != [
        answer.tokens
        for answer in Engine(model, STOPS, batch=4).answers(PROMPTS, 20, Sampling(1.2, seed=5))
    ]


def test_greedy_with_repetition_penalty_and_log_probs_are_transformers(model, chat_model):
    reference = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    found = Engine(model, [], batch=4).answers(PROMPTS[:6], 15, Sampling(repetition_penalty=1.3))
    for prompt, answer in zip(PROMPTS[:6], found, strict=True):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, min_new_tokens=15,
            do_sample=False, repetition_penalty=1.3,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert answer.tokens == out.sequences[0, len(prompt) :].tolist()
        logs = [
            torch.log_softmax(logits[0], -1)[token].item()
            for logits, token in zip(out.logits, answer.tokens, strict=True)
        ]
        np.testing.assert_allclose(answer.log_probs, logs, atol=1e-4)


@pytest.fixture(scope="module")
def speaker(model, chat_model):
    return lambda *stop: TextGenerator(
        Engine(model, STOPS, batch=4), resolve(str(chat_model)).tokenizer(), stop
    )


def test_stop_strings(speaker):
    whole = speaker().answers(PROMPTS, 20)
    strings = [one.text[len(one.text) // 2 :][:2] for one in whole if len(one.text) > 6][:3]
    found = speaker(*strings).answers(PROMPTS, 20)
    stopped = 0
    for before, after in zip(whole, found, strict=True):
        ends = [before.text.find(string) for string in strings if string in before.text]
        assert after.text == (before.text[: min(ends)] if ends else before.text)
        assert after.end == ("string" if ends else before.end)
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert len(after.log_probs) == len(after.tokens)
        stopped += bool(ends)
    assert stopped >= 3
    with pytest.raises(UserError, match="A stop string is empty"):
        speaker("")


def test_the_streamed_parts_are_the_answer_and_never_half_of_a_stop_string(speaker):
    for prompt in PROMPTS:
        (whole,) = speaker().answers([prompt], 20)
        parts = list(speaker().stream(prompt, 20))
        assert "".join(parts) == whole.text
        if len(whole.text) > 8:
            assert len(parts) > 2
            stop = whole.text[4:7]
            (cut,) = speaker(stop).answers([prompt], 20)
            assert "".join(speaker(stop).stream(prompt, 20)) == cut.text


def test_few_programs_for_many_lengths(model):
    """Decoding is compiled once for all prompts of a size, reading them once for few sizes of
    batches and prompts.
    """
    engine = Engine(model, [], batch=4)
    before = programs.prefill._cache_size(), programs.decode._cache_size()
    for seed in range(6):
        random = np.random.default_rng(seed)
        engine.answers(
            [random.integers(0, 256, size).tolist() for size in random.integers(40, 61, 7)], 33
        )
    assert programs.decode._cache_size() - before[1] == 1
    assert programs.prefill._cache_size() - before[0] <= 4


MIXED = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_k=5, seed=3),
    Sampling(temperature=1.3, top_p=0.8, seed=9),
    Sampling(repetition_penalty=1.4),
    Sampling(temperature=0.9, min_p=0.1, repetition_penalty=0.8, seed=1),
]


def test_each_row_has_settings_of_its_own(model):
    """Rows with other settings beside it change no answer."""
    prompts = PROMPTS[: len(MIXED)]
    beside = Engine(model, STOPS, batch=4).answers(prompts, 12, MIXED)
    for number, (prompt, sampling) in enumerate(zip(prompts, MIXED, strict=True)):
        engine = Engine(model, STOPS, batch=1)
        request = engine.submit(prompt, 12, sampling, number=number)
        while not engine.idle:
            engine.step()
        assert beside[number].tokens == request.answer.tokens
        assert beside[number].end == request.answer.end


def test_other_settings_and_numbers_of_prompts_compile_nothing(model):
    engine = Engine(model, STOPS, batch=8)
    engine.answers(PROMPTS[:8], 10, Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=0))
    jitted = (programs.prefill, programs.begin, programs.decode, programs.insert, programs.grow)
    before = [program._cache_size() for program in jitted]
    for seed in range(1, 9):
        sampling = Sampling(
            temperature=0.1 * seed, top_p=1 - 0.1 * seed, top_k=seed, min_p=0.01 * seed, seed=seed
        )
        engine.answers(PROMPTS[: 7 + seed % 2], 10, sampling)  # 7 and 8 are of one bucket
    assert [program._cache_size() for program in jitted] == before


def test_requests_come_and_go_while_others_are_written(model, alone):
    engine = Engine(model, STOPS, batch=4)
    random = np.random.default_rng(0)
    waiting = list(range(len(PROMPTS)))
    requests, cancelled = {}, {}
    while waiting or not engine.idle:
        for _ in range(int(random.integers(0, 3))):
            if waiting:
                number = waiting.pop(0)
                requests[number] = engine.submit(PROMPTS[number], 20, interval=3)
        if random.random() < 0.5:  # one that nobody wants any more, long and drawn
            request = engine.submit(
                PROMPTS[6], 60, Sampling(temperature=2.0, repetition_penalty=1.1), interval=3
            )
            cancelled[len(cancelled)] = request
        engine.step()
        if cancelled and random.random() < 0.6:
            engine.cancel(cancelled[int(random.integers(len(cancelled)))])
        if not waiting:
            for request in cancelled.values():
                engine.cancel(request)
    assert len(cancelled) >= 3
    for number, request in requests.items():
        assert request.answer.tokens == alone[number].tokens
        assert request.answer.end == alone[number].end
        assert [
            token for piece in request.pieces for token in piece.tokens
        ] == request.answer.tokens
    assert {request.answer.end for request in cancelled.values()} <= {"cancel", "length", "stop"}
    assert "cancel" in {request.answer.end for request in cancelled.values()}


def test_a_longer_request_finds_room_beside_a_shorter_one(model, alone):
    engine = Engine(model, STOPS, batch=2)
    short = engine.submit(PROMPTS[3], 20, interval=2)
    engine.step()
    long = engine.submit(PROMPTS[6], 20)
    while not engine.idle:
        engine.step()
    assert short.answer.tokens == alone[3].tokens
    assert long.answer.tokens == alone[6].tokens


def test_a_stream_that_is_left_frees_its_row(model):
    engine = Engine(model, [], batch=1)
    stream = engine.stream(PROMPTS[0], 30, interval=1)
    first = next(stream)
    stream.close()
    assert engine.idle
    assert len(first.tokens) == 1
    assert len(engine.generate([PROMPTS[1]], 5)[0]) == 5


def test_a_shared_beginning_with_one_row(model):
    prompts = [[*range(100, 140), *tail] for tail in ([1], [2, 3, 4], [5, 6])]
    assert Engine(model, [], batch=1).generate(prompts, 6) == [
        Engine(model, [], batch=1).generate([prompt], 6)[0] for prompt in prompts
    ]


def test_the_speed_counts_tokens_and_no_compilation(model):
    engine = Engine(model, [], batch=4)
    engine.answers(PROMPTS, 20)
    speed = engine.speed
    assert speed.prompt_tokens == sum(map(len, PROMPTS))
    assert speed.new_tokens == 19 * len(PROMPTS)  # the first token of each comes with its prompt
    assert 0 < speed.decode_seconds < 60
    assert speed.decode == pytest.approx(speed.new_tokens / speed.decode_seconds)


def test_a_text_that_outgrows_the_rope_limit_in_shared_rows(tmp_path, one_device):
    """It is read anew with the frequencies of long texts; others in the batch go on beside it."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 24,
        "factor": 4.0,
    }
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    config = tools.tiny_config(max_position_embeddings=96, rope_parameters=rope)
    model = load_model(resolve(str(tools.save_model(tmp_path, config))), one_device)
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 30]
    found = Engine(model, [], batch=3).answers(prompts, 20)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(
            20
        ):  # each time from the start: transformers' cache keeps the frequencies of the short text
            ids.append(reference(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert answer.tokens == ids[len(prompt) :]
        assert answer.end == "length"
