"""What kind of answers a file has, and how they are judged."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.core.errors import UserError
from jaxtune.data.formats import Conversation

LM, CLASSIFICATION = "lm", "classification"
TASKS = ("auto", LM, CLASSIFICATION)
_MOST_CLASSES, _MOST_WORDS = 50, 5
_RESAMPLES = 1000


def detect(rows: Sequence[Conversation]) -> str:
    """`classification` where the answers are few, short and repeated, else `lm`."""
    answers = Counter(row.answer for row in rows)
    if None in answers or any(row.text for row in rows):
        return LM
    short = all(len(answer.split()) <= _MOST_WORDS for answer in answers if answer is not None)
    few = 2 <= len(answers) <= min(_MOST_CLASSES, len(rows) // 2)
    return CLASSIFICATION if short and few else LM


def classes(rows: Sequence[Conversation], path: str) -> list[str]:
    """The distinct answers of a file, sorted.

    Raises:
        UserError: a row does not end with an answer.

    """
    for row in rows:
        if row.answer is None:
            raise UserError(f"{row.place}: the row does not end with an assistant's answer, which classification needs.")
    found = sorted({row.answer for row in rows if row.answer is not None})
    if len(found) < 2:
        raise UserError(f"{path}: all answers are the same, so there is nothing to classify. Use --task lm.")
    return found


def normalised(text: str) -> str:
    """An answer without case, surrounding space and final full stop."""
    return text.strip().rstrip(".").strip().casefold()


def classification_metrics(truth: np.ndarray, chosen: np.ndarray, greedy: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Accuracy by likelihood and by generation, macro F1 and the confusion matrix, with 95% intervals.

    Args:
        truth: index of each row's class.
        chosen: index of its most likely class.
        greedy: whether the generated answer is the right one.
        names: the classes.

    """
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (truth, chosen), 1)
    right = truth == chosen
    intervals = {
        "accuracy": interval(len(truth), lambda rows: float(right[rows].mean())),
        "accuracy_greedy": interval(len(truth), lambda rows: float(greedy[rows].mean())),
        "macro_f1": interval(len(truth), lambda rows: macro_f1(truth[rows], chosen[rows], len(names))),
    }
    return {
        "accuracy": float(right.mean()),
        "accuracy_greedy": float(greedy.mean()),
        "macro_f1": macro_f1(truth, chosen, len(names)),
        "confusion": {"classes": names, "rows_true_columns_predicted": confusion.tolist()},
        "intervals": intervals,
    }


def macro_f1(truth: np.ndarray, chosen: np.ndarray, count: int) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for index in range(count):
        hits = int(((truth == index) & (chosen == index)).sum())
        either = int((truth == index).sum() + (chosen == index).sum())
        if either:
            scores.append(2 * hits / either)
    return float(np.mean(scores))


def interval(rows: int, metric: Any) -> list[float]:
    """95% percentile interval by bootstrap over rows (Efron 1979), the same at every call."""
    random = np.random.default_rng(0)
    values = [metric(random.integers(0, rows, rows)) for _ in range(_RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 6), round(float(high), 6)]
