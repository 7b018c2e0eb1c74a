"""Traps of the batches: token-weighted evaluation, no lost remainder, the same batches after a
resume.
"""

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.load import validated
from jaxtune.config.schema import DataSection
from jaxtune.data.chat.tokenize import Example
from jaxtune.data.examples import in_memory
from jaxtune.data.loader import BatchSchedule, batches
from jaxtune.data.packing import Layout, schedule_epoch
from jaxtune.evaluation.evaluate import EvalOptions, evaluate
from jaxtune.tracking.progress import Reporter
from jaxtune.training.evaluator import Evaluator
from jaxtune.training.setup import build_setup
from jaxtune.training.state import init_state
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools

pytestmark = pytest.mark.usefixtures("quick_compilation")


def examples(lengths):
    """Examples that fill so many positions, all but the first token supervised; ids name the
    example.
    """
    return in_memory(
        [
            Example(np.full(size + 1, number, np.int32), np.arange(size + 1) > 0)
            for number, size in enumerate(lengths)
        ]
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60),
    rows=st.integers(1, 5),
    packing=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_example_once_an_epoch_and_rows_hold_what_fits(
    lengths, rows, packing, shuffle, epoch
):
    layout = Layout(rows, 32, packing, shuffle, seed=3)
    epoch_rows = schedule_epoch(np.asarray(lengths), layout, epoch)
    all_batches = [epoch_rows.batch(number) for number in range(len(epoch_rows))]
    assert sorted(index for batch in all_batches for row in batch for index in row) == list(
        range(len(lengths))
    )
    assert all(len(batch) == rows for batch in all_batches[:-1])
    assert all(sum(lengths[index] for index in row) <= 32 for batch in all_batches for row in batch)
    again = schedule_epoch(np.asarray(lengths), layout, epoch)
    assert all_batches == [again.batch(number) for number in range(len(again))]


def test_epochs_differ_in_order_and_supervise_the_same_tokens():
    schedule = BatchSchedule(examples(range(1, 30)), Layout(3, 32, True, True, 0), epochs=3)
    by_epoch = {}
    for number in range(len(schedule)):
        by_epoch.setdefault(int(np.ceil(schedule.epoch(number))), []).append(schedule.batch(number))
    assert (
        len({str([batch.input_ids.tolist() for batch in part]) for part in by_epoch.values()}) == 3
    )
    assert [sum(batch.weights.sum() for batch in part) for part in by_epoch.values()] == [
        sum(range(1, 30))
    ] * 3


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("start", [1, 4, 9])
def test_batches_after_a_resume_are_those_of_the_whole_run(packing, start, one_device):
    def schedule():
        return BatchSchedule(
            examples(np.random.default_rng(0).integers(1, 30, 40)),
            Layout(4, 32, packing, True, 5),
            epochs=3,
        )

    whole = list(batches(schedule(), 0, 2, one_device))
    rest = list(batches(schedule(), start, 2, one_device))
    assert [loaded.index for loaded in rest] == list(range(start, len(schedule())))
    for left, right in zip(whole[start:], rest, strict=True):
        assert (left.tokens, left.padding) == (right.tokens, right.padding)
        chex.assert_trees_all_equal(left.batch, right.batch)


def test_steps_override_epochs():
    assert (
        len(BatchSchedule(examples([3] * 10), Layout(4, 32, False, True, 0), epochs=1, steps=7))
        == 7
    )
    assert len(BatchSchedule(examples([3] * 10), Layout(4, 32, False, True, 0), epochs=2)) == 6


def test_evaluation_is_weighted_by_tokens_the_same_at_every_batch_size(
    chat_model, one_device, tmp_path
):
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support import peft_side

    source = resolve(str(chat_model))
    model, tokenizer = load_model(source, one_device), source.tokenizer()
    rows = [
        tools.chat(f"say {'x' * (n % 5)}", "ab" * (1 + 7 * (n % 3)) + str(n)) for n in range(11)
    ]
    path = tools.write_rows(tmp_path / "rows.jsonl", rows)
    results = [
        evaluate(
            model, tokenizer, source.stop_ids(), DataSection(eval=path), EvalOptions("lm", size)
        ).as_dict()
        for size in (1, 3, 11, 16)
    ]
    reference = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    from jaxtune.data.formats.conversation import Conversation

    items = [
        tools.tokenize(tokenizer, Conversation("", row["messages"], False), "responses")
        for row in rows
    ]
    total, count = peft_side.token_loss(reference, [(item.ids, item.supervised) for item in items])
    for result in results:
        assert result["supervised_tokens"] == count
        assert result["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
        assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))


def test_evaluation_on_the_way_is_that_of_the_whole_file_at_every_batch_size(
    chat_model, one_device, tmp_path
):
    rows = [
        tools.chat(f"say {'x' * (n % 5)}", "ab" * (1 + 7 * (n % 3)) + str(n)) for n in range(11)
    ]
    path = tools.write_rows(tmp_path / "rows.jsonl", rows)
    source = resolve(str(chat_model))
    whole = evaluate(
        load_model(source, one_device),
        source.tokenizer(),
        source.stop_ids(),
        DataSection(eval=path),
        EvalOptions("lm"),
    ).as_dict()
    for size in (8, 16):  # eight devices
        sections = {
            "model": {"source": str(chat_model)},
            "data": {"train": path, "eval": path, "packing": False, "max_length": 128},
        }
        parts = build_setup(
            validated(sections | {"train": {"batch_size": size}}), Reporter(quiet=True)
        )
        with jax.set_mesh(parts.mesh):
            metrics = Evaluator(parts, parts.eval_schedule)(
                init_state(parts.trainable, parts.optimizer, 0)
            )
        assert metrics["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_classification_by_cache_equals_the_plain_forward_pass(chat_model, one_device, tmp_path):
    """Scores from a shared prefix and a cache give the loss that a whole forward pass gives, at
    every batch size.
    """
    source = resolve(str(chat_model))
    model, tokenizer = load_model(source, one_device), source.tokenizer()
    rows = [
        tools.chat(
            f"Which color is this, number {n}?" + "!" * (n % 4),
            ["red", "green", "light blue"][n % 3],
        )
        for n in range(12)
    ]
    path = tools.write_rows(tmp_path / "rows.jsonl", rows)
    plain = evaluate(
        model, tokenizer, source.stop_ids(), DataSection(eval=path), EvalOptions("lm")
    ).as_dict()
    for size in (2, 5, 32):
        result = evaluate(
            model, tokenizer, source.stop_ids(), DataSection(eval=path), EvalOptions(batch=size)
        ).as_dict()
        assert (result["task"], result["rows"], result["supervised_tokens"]) == (
            "classification",
            12,
            plain["supervised_tokens"],
        )
        assert result["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert np.sum(result["confusion"]["rows_true_columns_predicted"]) == 12
