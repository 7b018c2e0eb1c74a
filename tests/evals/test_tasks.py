"""Metrics on answers worked out by hand, and what counts as a class."""

import numpy as np
import pytest

from jaxtune.core.errors import UserError
from jaxtune.data.formats import Conversation
from jaxtune.evals.tasks import classes, classification_metrics, detect, interval, macro_f1, normalised


def rows(*answers):
    return [
        Conversation(f"f:{n}", [{"role": "user", "content": "?"}, {"role": "assistant", "content": a}], False)
        for n, a in enumerate(answers)
    ]


def test_detection():
    assert detect(rows("yes", "no", "yes", "no")) == "classification"
    assert detect(rows("yes", "no", "maybe", "often")) == "lm"  # nothing repeats
    assert detect(rows(*["a long answer of more than five words"] * 4, "no", "no")) == "lm"
    assert detect(rows(*["yes"] * 6)) == "lm"
    with pytest.raises(UserError, match="nothing to classify"):
        classes(rows("yes", "yes"), "f")
    with pytest.raises(UserError, match="does not end with an assistant's answer"):
        classes([Conversation("f:0", [{"role": "user", "content": "?"}], False)], "f")


def test_macro_f1_and_confusion():
    truth, chosen = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    # class 0: 2TP 0FP 1FN -> 4/5; class 1: 1TP 1FP 1FN -> 1/2; class 2: 1TP 1FP 0FN -> 2/3
    assert macro_f1(truth, chosen, 3) == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert macro_f1(truth, chosen, 5) == macro_f1(truth, chosen, 3)  # classes that never occur do not count
    found = classification_metrics(truth, chosen, np.array([1, 1, 0, 0, 0, 0], bool), ["a", "b", "c"])
    assert found["confusion"]["rows_true_columns_predicted"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["accuracy_greedy"] == pytest.approx(2 / 6)
    assert found["intervals"]["accuracy"][0] < 4 / 6 < found["intervals"]["accuracy"][1]


def test_interval_covers_and_repeats():
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(400, lambda chosen: float(values[chosen].mean()))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert (low, high) == tuple(interval(400, lambda chosen: float(values[chosen].mean())))


def test_answers_are_compared_without_case_space_and_full_stop():
    assert normalised(" Sport.\n") == normalised("sport") != normalised("sports")
