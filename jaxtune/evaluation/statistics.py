"""How sure a metric is: intervals by bootstrap, and two models compared on the same rows.

Every metric is a function of sums over rows (right answers, rows; losses, tokens; counts of
n-grams), so that drawing rows again or exchanging them is one matrix product.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxtune.core.errors import UserError

_RESAMPLES, _EXCHANGES = 1000, 9999
_MAX_NUMBERS = 1 << 23  # of draws that exist at once
_ROUNDING = 1e-12

type_sums = Float[np.ndarray, "*draws sums"]


@dataclass(frozen=True)
class Metric:
    """A metric of a model on rows.

    Attributes:
        rows: what each row contributes.
        of: the metric of the sums; works on any number of draws at once.

    """

    rows: Float[np.ndarray, "rows sums"]
    of: Callable[[type_sums], Float[np.ndarray, "*draws"]]

    @property
    def value(self) -> float:
        """The metric over all rows."""
        return float(self.of(self.rows.sum(axis=0)))

    def interval(self) -> list[float]:
        """Compute the 95% percentile interval by bootstrap over rows (Efron 1979).

        It is the same at every call.
        """
        values = [self.of(draws @ self.rows) for draws in _draws(len(self.rows))]
        return _interval(np.concatenate(values))


def ratio(parts: np.ndarray, wholes: np.ndarray) -> Metric:
    """Return the metric that divides the sum of `parts` by the sum of `wholes`."""
    return Metric(
        np.stack([parts, wholes], axis=1).astype(np.float64),
        lambda sums: sums[..., 0] / sums[..., 1],
    )


def mean(values: np.ndarray) -> Metric:
    """Return the metric that is the mean of one number a row."""
    return ratio(np.asarray(values, np.float64), np.ones(len(values)))


def compare(base: Metric, other: Metric) -> dict[str, Any]:
    """Compare two models on the same rows: `other` minus `base`.

    Returns the difference, its 95% interval by paired bootstrap, and a p-value.

    The p-value is that of the paired test by approximate randomization (Noreen 1989): how often a
    difference at least as large comes about when the two models' results are exchanged in a random
    half of the rows. It is two-sided.

    Raises:
        UserError: they are not of the same rows.

    """
    if base.rows.shape != other.rows.shape:
        raise UserError(
            "The two models were not evaluated on the same rows, so they cannot be compared."
        )
    draws = [
        other.of(draws @ other.rows) - base.of(draws @ base.rows)
        for draws in _draws(len(base.rows))
    ]
    observed = other.value - base.value
    gain, first, second = other.rows - base.rows, base.rows.sum(axis=0), other.rows.sum(axis=0)
    extreme = 0
    for exchanged in _exchanges(len(gain)):
        moved = exchanged @ gain
        extreme += int(
            (
                np.abs(other.of(second - moved) - base.of(first + moved))
                >= abs(observed) - _ROUNDING
            ).sum()
        )
    return {
        "difference": observed,
        "interval": _interval(np.concatenate(draws)),
        "p_value": (extreme + 1) / (_EXCHANGES + 1),
    }


def _draws(rows: int) -> Iterator[np.ndarray]:
    """Yield how often each row is drawn, in a thousand draws of all rows with replacement."""
    random = np.random.default_rng(0)
    for count in _portions(_RESAMPLES, rows):
        yield np.stack(
            [np.bincount(random.integers(0, rows, rows), minlength=rows) for _ in range(count)]
        ).astype(np.float64)


def _exchanges(rows: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for count in _portions(_EXCHANGES, rows):
        yield random.integers(0, 2, (count, rows)).astype(np.float64)


def _portions(total: int, rows: int) -> Iterator[int]:
    size = max(1, _MAX_NUMBERS // rows)
    for start in range(0, total, size):
        yield min(size, total - start)


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 6), round(float(high), 6)]
