"""Intervals and p-values against scipy's."""

import numpy as np
import pytest
from scipy import stats

from jaxtune.core.errors import UserError
from jaxtune.evaluation.metrics import macro_f1
from jaxtune.evaluation.statistics import compare, mean, ratio

RANDOM = np.random.default_rng(5)


def test_interval_covers_and_repeats():
    values = RANDOM.normal(size=400)
    low, high = mean(values).interval()
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert [low, high] == mean(values).interval()


def test_interval_of_a_ratio_is_scipys():
    losses, tokens = RANDOM.gamma(2.0, size=150), RANDOM.integers(1, 9, 150).astype(float)
    theirs = stats.bootstrap(
        (losses, tokens), lambda a, b, axis=-1: a.sum(axis) / b.sum(axis), paired=True,
        method="percentile", n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    low, high = ratio(losses, tokens).interval()
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.1 * (high - low))


def test_p_value_is_that_of_the_exact_paired_test():
    """Twelve rows: all 4,096 exchanges can be counted."""
    one, other = RANDOM.normal(size=12), RANDOM.normal(0.6, size=12)
    exact = stats.permutation_test(
        (one, other),
        lambda a, b, axis=-1: (b - a).mean(axis),
        permutation_type="samples",
        n_resamples=np.inf,
    ).pvalue
    found = compare(mean(one), mean(other))
    assert found["difference"] == pytest.approx((other - one).mean())
    assert found["p_value"] == pytest.approx(exact, abs=0.015)
    assert found["interval"][0] < found["difference"] < found["interval"][1]


def test_the_same_model_does_not_differ_and_a_better_one_does():
    right = RANDOM.random(200) < 0.5
    same = compare(mean(right), mean(right))
    assert (same["difference"], same["p_value"], same["interval"]) == (0, 1, [0, 0])
    better = compare(mean(right), mean(right | (RANDOM.random(200) < 0.3)))
    assert better["p_value"] < 0.001 < better["interval"][0]


def test_figures_that_are_no_means_are_compared_too():
    truth = RANDOM.integers(0, 3, 60)
    poor, good = RANDOM.integers(0, 3, 60), np.where(RANDOM.random(60) < 0.8, truth, 0)
    found = compare(macro_f1(truth, poor, 3), macro_f1(truth, good, 3))
    assert found["p_value"] < 0.01
    assert found["difference"] == pytest.approx(
        macro_f1(truth, good, 3).value - macro_f1(truth, poor, 3).value
    )


def test_pairing_counts():
    """Rows of very unlike difficulty: only row by row is the small gain seen."""
    hard = RANDOM.normal(scale=10, size=50)
    gain = RANDOM.normal(0.5, 0.3, size=50)
    assert compare(mean(hard), mean(hard + gain))["p_value"] < 0.001
    assert compare(mean(hard), mean(RANDOM.permutation(hard + gain)))["p_value"] > 0.05


def test_other_rows_are_refused():
    with pytest.raises(UserError, match="not evaluated on the same rows"):
        compare(mean(np.ones(3)), mean(np.ones(4)))
