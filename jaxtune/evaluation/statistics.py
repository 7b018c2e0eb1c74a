"""How sure a figure is: intervals by bootstrap, and two models compared on the same rows.

Every figure is a function of sums over rows (right answers, rows; losses, tokens; counts of
n-grams), so that drawing rows again or exchanging them is one matrix product.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxtune.core.errors import UserError

_RESAMPLES, _EXCHANGES = 1000, 9999
_MOST_NUMBERS = 1 << 23  # of draws that exist at once
_ROUNDING = 1e-12

type_sums = Float[np.ndarray, "*draws figures"]


@dataclass(frozen=True)
class Metric:
    """A figure of a model on rows.

    Attributes:
        rows: what each row contributes.
        of: the figure of the sums; works on any number of draws at once.

    """

    rows: Float[np.ndarray, "rows figures"]
    of: Callable[[type_sums], Float[np.ndarray, "*draws"]]

    @property
    def value(self) -> float:
        """The figure of all rows."""
        return float(self.of(self.rows.sum(axis=0)))

    def interval(self) -> list[float]:
        """95% percentile interval by bootstrap over rows (Efron 1979), the same at every call."""
        found = [self.of(draws @ self.rows) for draws in _draws(len(self.rows))]
        return _interval(np.concatenate(found))


def ratio(parts: np.ndarray, wholes: np.ndarray) -> Metric:
    """Sum of `parts` over sum of `wholes`."""
    return Metric(
        np.stack([parts, wholes], axis=1).astype(np.float64),
        lambda sums: sums[..., 0] / sums[..., 1],
    )


def mean(values: np.ndarray) -> Metric:
    """The mean of a number of each row."""
    return ratio(np.asarray(values, np.float64), np.ones(len(values)))


def compared(one: Metric, other: Metric) -> dict[str, Any]:
    """What `other` has more than `one`, both of the same rows: the difference, its 95% interval by
    paired bootstrap, and a p-value.

    The p-value is that of the paired test by approximate randomization (Noreen 1989): how often a
    difference at least so large comes about when the two models' results are exchanged in a random
    half of the rows. It is two-sided.

    Raises:
        UserError: they are not of the same rows.

    """
    if one.rows.shape != other.rows.shape:
        raise UserError(
            "The two models were not evaluated on the same rows, so they cannot be compared."
        )
    draws = [
        other.of(draws @ other.rows) - one.of(draws @ one.rows) for draws in _draws(len(one.rows))
    ]
    observed = other.value - one.value
    gain, first, second = other.rows - one.rows, one.rows.sum(axis=0), other.rows.sum(axis=0)
    extreme = 0
    for exchanged in _exchanges(len(gain)):
        moved = exchanged @ gain
        extreme += int(
            (
                np.abs(other.of(second - moved) - one.of(first + moved))
                >= abs(observed) - _ROUNDING
            ).sum()
        )
    return {
        "difference": observed,
        "interval": _interval(np.concatenate(draws)),
        "p_value": (extreme + 1) / (_EXCHANGES + 1),
    }


def _draws(rows: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, for a thousand draws of as many rows as there are, with
    replacement.
    """
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
    size = max(1, _MOST_NUMBERS // rows)
    for start in range(0, total, size):
        yield min(size, total - start)


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 6), round(float(high), 6)]
