"""Figures worked out by hand or by the libraries that others use, and what counts as which task."""

import numpy as np
import pytest
import sacrebleu

from jaxtune.core.errors import UserError
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.registry import read_conversation
from jaxtune.data.sources.row import Row, RowError, RowLocation
from jaxtune.evaluation import metrics
from jaxtune.evaluation.tasks import accepted_answers, check_task, detect_task, list_classes


def rows(*answers):
    return [
        Conversation(
            f"f:{n}", [{"role": "user", "content": "?"}, {"role": "assistant", "content": a}], False
        )
        for n, a in enumerate(answers)
    ]


def row(**value):
    return read_conversation(Row(RowLocation("f", 1), value))


def test_detection():
    assert detect_task(rows("yes", "no", "yes", "no")) == "classification"
    assert detect_task(rows("yes", "no", "maybe", "often")) == "qa"  # nothing repeats
    assert detect_task(rows(*["a long answer of more than five words"] * 4, "no", "no")) == "lm"
    assert detect_task(rows(*["yes"] * 6)) == "qa"
    assert (
        detect_task(rows(*["\u6211\u4eec" * 40] * 6, "\u662f")) == "lm"
    )  # one word, by the spaces in it
    assert detect_task([row(question="2+2?", choices=["3", "4"], answer=1)] * 3) == "choice"
    assert detect_task([row(text="word")] * 3) == "lm"
    with pytest.raises(UserError, match="nothing to classify"):
        list_classes(rows("yes", "yes"), "f")
    asked = [Conversation("f:0", [{"role": "user", "content": "?"}], False)]
    for task in ("classification", "qa", "generation"):
        with pytest.raises(UserError, match="does not end with an assistant's answer"):
            check_task(task, asked)
    with pytest.raises(UserError, match="has no 'choices'"):
        check_task("choice", rows("yes"))


def test_choices_are_read_by_number_label_or_text():
    arc = {"text": ["red", "green"], "label": ["A", "B"]}
    for value in (
        {"question": "?", "choices": ["red", "green"], "answer": 1},
        {"prompt": "?", "choices": ["red", "green"], "answer": "green"},
        {"prompt": "?", "choices": ["red", "green"], "label": "B"},
        {"question": "?", "choices": arc, "answerKey": "B"},
        {
            "question": "?",
            "choices": {"text": ["red", "green"], "label": ["1", "2"]},
            "answerKey": "2",
        },
    ):
        found = row(**value)
        assert (found.answer, found.choices, found.prompt[0]["content"]) == (
            "green",
            ("red", "green"),
            "?",
        )
    for answer in (2, -1, "blue", True, None):
        with pytest.raises(RowError, match="neither the number of a choice"):
            row(question="?", choices=["red", "green"], answer=answer)
    completed = row(
        prompt="?", completion="red", choices=["red", "green"]
    )  # the column is there, and the answer is written out
    assert (completed.answer, completed.choices) == ("red", ())
    with pytest.raises(RowError, match="not a list of at least two texts"):
        row(question="?", choices=["red"], answer=0)


def test_macro_f1_and_confusion():
    truth, chosen = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    # class 0: 2TP 0FP 1FN -> 4/5; class 1: 1TP 1FP 1FN -> 1/2; class 2: 1TP 1FP 0FN -> 2/3
    assert metrics.macro_f1(truth, chosen, 3).value == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    several = metrics.macro_f1(truth, chosen, 5)
    assert (
        several.value == metrics.macro_f1(truth, chosen, 3).value
    )  # classes that never occur do not count
    assert metrics.confusion(truth, chosen, ["a", "b", "c"])["rows_true_columns_predicted"] == [
        [2, 1, 0],
        [0, 1, 1],
        [0, 0, 1],
    ]
    found = metrics.classification(truth, chosen, np.array([1, 1, 0, 0, 0, 0], bool), 3)
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(
        {"accuracy": 4 / 6, "accuracy_greedy": 2 / 6, "macro_f1": (4 / 5 + 1 / 2 + 2 / 3) / 3}
    )


def test_answers_are_compared_without_case_space_and_full_stop():
    assert (
        metrics.normalized(" Sport.\n")
        == metrics.normalized("sport")
        != metrics.normalized("sports")
    )


def test_question_answering_as_squad():
    found = metrics.question_answering(
        ["The Eiffel Tower!", "in the year of 1889", "nobody", ""],
        [["eiffel tower"], ["1889", "year 1889"], ["Gustave Eiffel"], [""]],
    )
    assert found["exact_match"].value == pytest.approx(2 / 4)
    # "in year of 1889" with "year 1889": 2 * 2 / (4 + 2)
    assert found["token_f1"].value == pytest.approx((1 + 4 / 6 + 0 + 1) / 4)
    # a word counts as often as both have it: 2 * 1 / (2 + 1)
    assert metrics.token_f1("yes yes", "yes") == pytest.approx(2 / 3)
    assert metrics.token_f1("yes yes no", "yes yes") == pytest.approx(4 / 5)


TEXTS = ["the cat sat on the mat", "hello there my friend", "an entirely different sentence here"]
WANTED = [
    ["the cat sat on a mat", "a cat was on the mat"],
    ["hello my dear friend"],
    ["something else"],
]


def test_corpus_figures_are_sacrebleus_and_rouge_is_of_the_best_reference():
    found = metrics.generation(TEXTS, WANTED)
    references = [
        [rights[min(number, len(rights) - 1)] for rights in WANTED] for number in range(2)
    ]
    assert found["bleu"].value == pytest.approx(
        sacrebleu.corpus_bleu(TEXTS, references).score / 100, abs=1e-9
    )
    assert found["chrf"].value == pytest.approx(
        sacrebleu.corpus_chrf(TEXTS, references).score / 100, abs=1e-9
    )
    # longest common subsequences 5 of 6 and 6, 3 of 4 and 4, 0
    assert found["rouge_l"].value == pytest.approx((5 / 6 + 3 / 4 + 0) / 3)
    assert "json_valid" not in found
    assert metrics.generation(TEXTS, [[text] for text in TEXTS])["chrf"].value == pytest.approx(1)


def test_json_answers_are_judged_by_what_they_say():
    texts = ['{"b": [1, 2], "a": null}', '{"a": 1', '{"a": 2}', 'Here: {"a": 1}']
    found = metrics.generation(
        texts, [['{"a": null, "b": [1, 2]}'], ['{"a": 1}'], ['{"a": 1}'], ['{"a": 1}']]
    )
    assert found["json_valid"].value == pytest.approx(2 / 4)
    assert found["json_match"].value == pytest.approx(1 / 4)


def test_choices_plain_and_by_length():
    scores = [np.array([-2.0, -3.0]), np.array([-2.0, -3.0]), np.array([-1.0, -9.0, -9.0])]
    lengths = [np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([1.0, 1.0, 1.0])]
    found = metrics.choice(scores, lengths, [1, 0, 0])
    assert (found["accuracy"].value, found["accuracy_norm"].value) == pytest.approx((2 / 3, 1.0))


def test_other_answers_that_are_right():
    assert accepted_answers(row(prompt="?", completion="1889", answers=["1889", "in 1889"])) == [
        "1889",
        "in 1889",
    ]
    assert accepted_answers(row(prompt="?", completion="yes")) == ["yes"]
