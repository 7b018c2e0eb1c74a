"""Traps of the data: masks, end of turn, BOS, templates, truncation, packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import RunError, UserError
from jaxtune.data.chat.tokenize import ConversationTokenizer, Example, prompt_ids
from jaxtune.data.examples import fed_length, in_memory
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.packing import Layout, build_batch, schedule_epoch
from jaxtune.data.prepare import prepare
from jaxtune.evaluation.evaluate import row_losses
from jaxtune.objectives.sft import sft
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools

TALK = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "fine, thanks </s> end"},
]
TEMPLATES = {
    "chatml": (
        tools.CHATML,
        "<|im_end|>",
        ["assistant<|im_end|>", "fine, thanks </s> end<|im_end|>"],
    ),
    "llama3": (
        tools.LLAMA3,
        "<|eot_id|>",
        ["assistant<|eot_id|>", "fine, thanks </s> end<|eot_id|>"],
    ),
    "llama2": (tools.LLAMA2, "</s>", ["assistant </s>", "fine, thanks </s> end </s>"]),
}


def conversation(messages=TALK, plain=False):
    return Conversation("rows.jsonl:1", messages, plain)


def supervised_texts(tokenizer, example):
    """Runs of supervised tokens, decoded."""
    runs, previous = [], False
    for token, supervised_now in zip(example.ids, example.supervised, strict=True):
        if supervised_now:
            runs = runs + [[]] if not previous else runs
            runs[-1].append(int(token))
        previous = supervised_now
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_templates_and_answers_with_their_end_are_supervised(name):
    template, eos, answers = TEMPLATES[name]
    tokenizer = tools.byte_tokenizer(template, eos)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = tools.tokenize(tokenizer, conversation(), "responses")
    assert example.ids.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert supervised_texts(tokenizer, example) == answers
    assert (
        supervised_texts(tokenizer, tools.tokenize(tokenizer, conversation(), "last"))
        == answers[-1:]
    )
    assert tools.tokenize(tokenizer, conversation(), "all").supervised.all()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_generation_is_the_template(name):
    template, eos, _ = TEMPLATES[name]
    tokenizer = tools.byte_tokenizer(template, eos)
    expected = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True)["input_ids"]
    assert prompt_ids(tokenizer, conversation()) == expected


def build(rows, examples, count, length):
    return build_batch(rows, examples, in_memory(examples).lengths, (count, length))


@pytest.mark.parametrize("add_bos", [False, True])
def test_exactly_one_bos(add_bos):
    for template, eos in (
        (tools.LLAMA3, "<|eot_id|>"),
        (tools.CHATML, "<|im_end|>"),
        (None, "</s>"),
    ):
        tokenizer = tools.byte_tokenizer(template, eos, add_bos)
        chat = conversation(TALK[:2], plain=True)
        expected = 1 if template == tools.LLAMA3 or (add_bos and template is None) else 0
        for ids in (
            tools.tokenize(tokenizer, chat, "responses").ids.tolist(),
            prompt_ids(tokenizer, chat),
        ):
            assert ids.count(tokenizer.bos_token_id) == expected


def test_the_last_target_is_the_end_of_turn_and_padding_is_never_one():
    tokenizer = tools.byte_tokenizer()
    examples = [
        tools.tokenize(tokenizer, conversation(TALK[:2]), "responses"),
        tools.tokenize(tokenizer, conversation(), "responses"),
    ]
    batch = build([(0,), (1,)], examples, 3, 160)
    for row, example in enumerate(examples):
        size = fed_length(example)
        assert batch.target_ids[row, size - 1] == tokenizer.eos_token_id
        assert batch.weights[row, size - 1] == 1
        assert not batch.weights[row, size:].any()
        assert batch.weights[row].sum() == example.supervised.sum()
    assert not batch.weights[2].any()


def test_truncation_that_leaves_nothing_drops_the_row_and_counts_it(tmp_path):
    tokenizer = tools.byte_tokenizer()
    rows = [
        tools.chat("q" * 10, "yes"),
        tools.chat("q" * 500, "yes"),
        tools.chat("q" * 10, "y" * 500),
    ]
    rows.append({"messages": [{"role": "user", "content": "no answer"}]})
    path = tools.write_rows(tmp_path / "rows.jsonl", rows)
    examples = prepare(DataSection(train=path, max_length=100), tokenizer)
    assert [
        list(locations) for locations in (examples.truncated, examples.cut_off, examples.unanswered)
    ] == [
        [f"{path}:2", f"{path}:3"],
        [f"{path}:2"],
        [f"{path}:4"],
    ]
    assert len(examples.items) == 2
    assert all(item.supervised[1:].any() and fed_length(item) <= 100 for item in examples.items)
    with pytest.raises(UserError, match="no row has a supervised token"):
        prepare(DataSection(train=path, max_length=5), tokenizer)
    with pytest.raises(RunError, match="no supervised token"):
        build_batch([], [], np.zeros(0, int), (2, 8))
    with pytest.raises(RunError, match="no supervised token"):
        build_batch([(0,)], [Example(np.arange(5), np.zeros(5))], np.array([3]), (2, 8))


def test_a_template_that_rewrites_answers_is_refused_not_masked_to_zero():
    shouting = tools.CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: the chat template changes the text of messages\[1\]"
    ):
        tools.tokenize(tools.byte_tokenizer(shouting), conversation(TALK[:2]), "responses")
    other_prompt = tools.CHATML.replace("assistant\n'}}{% endif", "assistant: '}}{% endif")
    with pytest.raises(UserError, match="differently from the prompt"):
        tools.tokenize(tools.byte_tokenizer(other_prompt), conversation(TALK[:2]), "responses")
    dropping = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}"
        + tools.CHATML.split("{% for m in messages %}")[1].replace(
            "{% endfor %}", "{% endif %}{% endfor %}"
        )
    )
    tokenizer = tools.byte_tokenizer(dropping)
    (documents,) = ConversationTokenizer(tokenizer, "responses")([conversation()])
    assert [document.rewritten for document in documents] == [True, True]
    for document, through in zip(documents, (2, 4), strict=True):
        example = document.example()
        assert example.ids.tolist() == tokenizer.apply_chat_template(TALK[:through])["input_ids"]
        assert supervised_texts(tokenizer, example) == [TALK[through - 1]["content"] + "<|im_end|>"]


def test_a_prompt_that_is_no_token_prefix_is_masked_by_characters(smollm2):
    """'1' + '23' merges over the border of prompt and answer where the tokenizer has the merge;
    the mask must not shift.
    """
    tokenizer = resolve(str(smollm2)).tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "The capital is Par"},
        {"role": "assistant", "content": "is, in France"},
    ]
    example = tools.tokenize(tokenizer, conversation(messages), "responses")
    prompt = tokenizer("The capital is Par")["input_ids"]
    assert example.ids[: len(prompt)].tolist() != prompt
    assert supervised_texts(tokenizer, example) == [" Paris, in France<|im_end|>"]


def packed_losses(model, examples, layout):
    """Loss of every supervised token by (example, position), from packed or unpacked batches."""
    graph, state = nnx.split(model)

    @jax.jit
    def token_losses(state, batch):
        model = nnx.merge(graph, state)
        logits = model(batch.input_ids, segment_ids=batch.segment_ids, positions=batch.positions)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.target_ids[..., None], -1)[
            ..., 0
        ]

    losses_by_token = {}
    lengths = np.asarray([fed_length(example) for example in examples])
    epoch = schedule_epoch(lengths, layout, 0)
    for rows in map(epoch.batch, range(len(epoch))):
        batch = build(rows, examples, layout.rows, layout.max_length)
        losses = np.asarray(token_losses(state, batch))
        for number, row in enumerate(rows):
            at = 0
            for index in row:
                for position in range(lengths[index]):
                    losses_by_token[index, position] = (
                        losses[number, at + position] * batch.weights[number, at + position]
                    )
                at += lengths[index]
    return losses_by_token


def test_packed_loss_is_the_unpacked_loss_token_by_token(chat_model, one_device):
    model = load_model(resolve(str(chat_model)), one_device)
    tokenizer = tools.byte_tokenizer()
    examples = [
        tools.tokenize(tokenizer, conversation(row["messages"]), "responses")
        for row in tools.sums(20)
    ]
    packed = packed_losses(model, examples, Layout(4, 256, packing=True, shuffle=True, seed=1))
    alone = packed_losses(model, examples, Layout(4, 256, packing=False, shuffle=False, seed=0))
    assert packed.keys() == alone.keys()
    for place, loss in alone.items():
        assert packed[place] == pytest.approx(loss, abs=1e-4), place
    sums, _ = row_losses(model, in_memory(examples), 4)
    assert sums.sum() == pytest.approx(sum(alone.values()), rel=1e-5)


def test_no_target_crosses_from_one_example_to_the_next():
    random = np.random.default_rng(0)
    examples = [
        Example(random.integers(0, 99, size).astype(np.int32), np.arange(size) > 1)
        for size in (5, 7, 4)
    ]
    batch = build([(0, 1, 2)], examples, 1, 16)
    at = 0
    for number, example in enumerate(examples):
        size = len(example.ids) - 1
        assert batch.input_ids[0, at : at + size].tolist() == example.ids[:-1].tolist()
        assert batch.target_ids[0, at : at + size].tolist() == example.ids[1:].tolist()
        assert batch.positions[0, at : at + size].tolist() == list(range(size))
        assert set(batch.segment_ids[0, at : at + size]) == {number + 1}
        at += size
    assert batch.weights.sum() == sum(example.supervised[1:].sum() for example in examples)


def test_sft_sums_and_does_not_average(chat_model, one_device):
    """Doubling a batch doubles both sums."""
    model = load_model(resolve(str(chat_model)), one_device)
    examples = [
        tools.tokenize(tools.byte_tokenizer(), conversation(row["messages"]), "responses")
        for row in tools.sums(4)
    ]
    once = build([(0,), (1,)], examples, 2, 96)
    twice = jax.tree.map(lambda part: np.concatenate([part, part]), once)
    (loss, weight, _), (loss2, weight2, _) = sft(model, once), sft(model, twice)
    assert float(loss2) == pytest.approx(2 * float(loss), rel=1e-5)
    assert float(weight2) == 2 * float(weight)
