"""Pairs and marked answers: read, masked, laid side by side, packed and resumed."""

import json

import numpy as np
import pytest

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError
from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED
from jaxtune.data.loader import BatchSchedule
from jaxtune.data.packing import Layout
from jaxtune.data.prepare import prepare
from tests.support import tools

ROWS = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no" * (n + 1)} for n in range(6)]


@pytest.fixture
def words():
    return tools.byte_tokenizer()


def pairs(tmp_path, words, rows, comparison="pairs", **keys):
    return prepare(
        DataSection(train=tools.write_rows(tmp_path / "rows.jsonl", rows), **keys),
        words,
        comparison=comparison,
    )


def said(words, example):
    return words.decode(example.ids[example.supervised])


def as_messages(row):
    user = {"role": "user", "content": row["prompt"]}
    return {
        key: [user, {"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")
    }  # the prompt is their common beginning


WAYS = {
    "texts": (lambda row: row, {}),
    "conversations": (as_messages, {}),
    "prompt and answers as messages": (
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        },
        {},
    ),
    "other columns": (
        lambda row: {"question": row["prompt"], "better": row["chosen"], "worse": row["rejected"]},
        {"columns": {"prompt": "question", "chosen": "better", "rejected": "worse"}},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_pairs_of_every_shape_give_the_same_tokens(way, tmp_path, words):
    change, keys = WAYS[way]
    examples = pairs(tmp_path, words, [change(row) for row in ROWS], **keys)
    assert len(examples.items) == 6
    for row, item in zip(ROWS, examples.items, strict=True):
        assert item.labels == (CHOSEN, REJECTED)
        for answer, key in zip(item.answers, ("chosen", "rejected"), strict=True):
            chat = tools.chat(row["prompt"], row[key])["messages"]
            assert (
                answer.ids.tolist()[: len(answer.ids)]
                == words.apply_chat_template(chat, return_dict=False)[: len(answer.ids)]
            )
            assert said(words, answer) == f"{row[key]}<|im_end|>"


def test_marked_answers_each_have_another_rows_answer_to_their_prompt(tmp_path, words):
    rows = [{"prompt": f"{n}?", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(5)]
    examples = pairs(tmp_path, words, rows, "labels")
    for number, item in enumerate(examples.items):
        ours, theirs = item.answers
        assert item.labels == (REJECTED if number % 2 else CHOSEN, MISMATCHED)
        assert said(words, ours) == f"answer {number}<|im_end|>"
        assert said(words, theirs).startswith("answer ")
        assert said(words, theirs) != said(words, ours)
        prompt = int(np.flatnonzero(ours.weights)[0])
        assert ours.ids[:prompt].tolist() == theirs.ids[:prompt].tolist()


def test_a_pair_is_one_good_and_one_bad_answer_where_labels_are_wanted(tmp_path, words):
    examples = pairs(tmp_path, words, ROWS, "labels")
    assert [item.labels[0] for item in examples.items] == [CHOSEN, REJECTED] * 6


BAD = {
    "the same answer": (
        {"prompt": "?", "chosen": "a", "rejected": "a"},
        "pairs",
        "'chosen' and 'rejected' are the same answer",
    ),
    "no rejected": ({"prompt": "?", "chosen": "a"}, "pairs", "the key 'rejected' is missing"),
    "no pair": ({"prompt": "?", "completion": "a"}, "pairs", "the key 'chosen' is missing"),
    "no label": ({"prompt": "?", "completion": "a"}, "labels", "'label' must be true"),
    "a label in words": (
        {"prompt": "?", "completion": "a", "label": "good"},
        "labels",
        "'label' must be true",
    ),
    "other prompts": (
        {"chosen": tools.chat("a", "x")["messages"], "rejected": tools.chat("b", "y")["messages"]},
        "pairs",
        "do not answer the same prompt",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name, tmp_path, words):
    row, comparison, message = BAD[name]
    good = ROWS[0] if comparison == "pairs" else {"prompt": "?", "completion": "a", "label": True}
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{message}"):
        pairs(tmp_path, words, [good, row], comparison)
    assert len(pairs(tmp_path, words, [good, good, row], comparison, on_error="skip").items) == 2


def test_a_pair_of_which_one_answer_is_cut_off_is_left_out_whole(tmp_path, words):
    rows = [*ROWS, {"prompt": "?" * 60, "chosen": "a", "rejected": "b"}]
    examples = pairs(tmp_path, words, rows, max_length=60)
    assert len(examples.items) == 6
    assert len(examples.cut_off) == 2


@pytest.mark.parametrize("packing", [False, True])
def test_every_pair_is_in_an_epoch_once_with_its_two_answers_side_by_side(packing, tmp_path, words):
    examples = pairs(tmp_path, words, ROWS)
    schedule = BatchSchedule(examples, Layout(2, 256, packing, True, 0), epochs=1)
    seen = []
    for index in range(len(schedule)):
        batch = schedule.batch(index)
        assert batch.labels.shape[1] % 2 == 0
        for row in range(2):
            for segment, label in enumerate(batch.labels[row], 1):
                place = batch.segment_ids[row] == segment
                assert place.any() == (label > 0)
                assert label == (0 if not place.any() else REJECTED if segment % 2 == 0 else CHOSEN)
                if label:
                    answer = batch.target_ids[row][place & (batch.weights[row] > 0)]
                    seen.append((int(label), words.decode(answer).removesuffix("<|im_end|>")))
                    assert batch.positions[row][place].tolist() == list(range(place.sum()))
    assert sorted(seen) == sorted(
        [(CHOSEN, row["chosen"]) for row in ROWS] + [(REJECTED, row["rejected"]) for row in ROWS]
    )


def test_pairs_are_not_mistaken_for_answers_to_imitate(tmp_path, words):
    with pytest.raises(
        UserError,
        match=r"a pair of preferences, which is for train.objective=dpo, simpo, orpo or kto",
    ):
        pairs(tmp_path, words, ROWS, None)


def test_jaxtune_data_shows_both_answers(chat_model, tmp_path):
    path = tools.write_rows(tmp_path / "rows.jsonl", ROWS)
    shown = tools.jaxtune(
        "data", "--model", chat_model, "--data", path, "train.objective=dpo", "--rows", "1"
    )
    assert shown.returncode == 0, shown.stderr
    assert "[good]" in shown.stdout
    assert "⟦yes 0<|im_end|>⟧" in shown.stdout
    assert "⟦no<|im_end|>⟧" in shown.stdout
    figures = tools.jaxtune(
        "data", "--model", chat_model, "--data", path, "train.objective=dpo", "--json", "-"
    )
    assert json.loads(figures.stdout)["parts"]["train"]["examples"] == 6


def test_labels_that_are_flipped_are_other_data(tmp_path, words):
    """The tokens are the same, so a run that goes on would not notice it by them."""
    rows = [{"prompt": f"{n}?", "completion": f"yes {n}", "label": n % 2 == 0} for n in range(6)]
    flipped = [row | {"label": not row["label"]} for row in rows]
    one, same, other = (
        pairs(tmp_path, words, part, comparison="labels") for part in (rows, rows, flipped)
    )
    assert one.digest == other.digest
    assert one.labels_digest() == same.labels_digest() != other.labels_digest()
