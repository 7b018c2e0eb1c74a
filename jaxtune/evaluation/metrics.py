"""How answers are judged, a task at a time."""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.evaluation.statistics import Metric, mean


def classification(
    truth: np.ndarray, likeliest: np.ndarray, greedy: np.ndarray, count: int
) -> dict[str, Metric]:
    """Compute accuracy by likelihood and by generation, and macro F1.

    Args:
        truth: index of each row's class.
        likeliest: index of its most likely class.
        greedy: whether the generated answer is the right one.
        count: of classes.

    """
    return {
        "accuracy": mean(truth == likeliest),
        "accuracy_greedy": mean(greedy),
        "macro_f1": macro_f1(truth, likeliest, count),
    }


def macro_f1(truth: np.ndarray, predicted: np.ndarray, count: int) -> Metric:
    """Compute the mean of 2 TP / (2 TP + FP + FN) over the classes that occur."""
    classes = np.arange(count)
    is_true, is_predicted = (labels[:, None] == classes for labels in (truth, predicted))
    rows = np.concatenate([is_true & is_predicted, is_true, is_predicted], axis=1).astype(
        np.float64
    )

    def of(sums: np.ndarray) -> np.ndarray:
        hits, true, predicted = np.split(sums, 3, axis=-1)
        either = true + predicted
        scores = np.where(either > 0, 2 * hits / np.maximum(either, 1), 0.0)
        return scores.sum(axis=-1) / np.maximum((either > 0).sum(axis=-1), 1)

    return Metric(rows, of)


def confusion(truth: np.ndarray, predicted: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Count how often each class was predicted for each."""
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, (truth, predicted), 1)
    return {"classes": names, "rows_true_columns_predicted": table.tolist()}


def question_answering(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Metric]:
    """Compute exact match and token F1 as SQuAD does (Rajpurkar et al. 2016).

    Each answer counts with the reference that is nearest.
    """
    pairs = list(zip(texts, references, strict=True))
    return {
        "exact_match": mean(
            np.asarray(
                [max(_words(text) == _words(right) for right in rights) for text, rights in pairs]
            )
        ),
        "token_f1": mean(
            np.asarray([max(token_f1(text, right) for right in rights) for text, rights in pairs])
        ),
    }


def generation(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Compute ROUGE-1, -2 and -L (F1; Lin 2004), and BLEU and chrF of the corpus, from 0 to 1.

    BLEU: Papineni et al. 2002; chrF: Popovic 2015. Where all references are JSON objects or lists,
    also how many answers are JSON, and how many equal a reference.
    """
    metrics = {**_rouge(texts, references), **_corpus(texts, references)}
    if all(isinstance(_parsed(right), dict | list) for rights in references for right in rights):
        metrics |= json_validity(texts, references)
    return metrics


def json_validity(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Compute the share of answers that are JSON, and of those that equal a reference.

    The order of keys does not matter.
    """
    values = [_parsed(text) for text in texts]
    same = [
        value is not _NOT_JSON
        and any(_canonical(value) == _canonical(_parsed(right)) for right in rights)
        for value, rights in zip(values, references, strict=True)
    ]
    return {
        "json_valid": mean(np.asarray([value is not _NOT_JSON for value in values])),
        "json_match": mean(np.asarray(same)),
    }


def choice(
    scores: Sequence[np.ndarray], lengths: Sequence[np.ndarray], truth: Sequence[int]
) -> dict[str, Metric]:
    """Compute the accuracy of the likeliest choice, by likelihood and by likelihood a character.

    The second is acc_norm of the evaluation harness.

    Args:
        scores: log-probability of each choice, a row at a time.
        lengths: their characters.
        truth: index of the right one.

    """
    plain = [row.argmax() == right for row, right in zip(scores, truth, strict=True)]
    by_length = [
        (row / size).argmax() == right
        for row, size, right in zip(scores, lengths, truth, strict=True)
    ]
    return {"accuracy": mean(np.asarray(plain)), "accuracy_norm": mean(np.asarray(by_length))}


def normalized(text: str) -> str:
    """Remove case, surrounding space and a final full stop from an answer."""
    return text.strip().rstrip(".").strip().casefold()


def token_f1(text: str, right: str) -> float:
    """Compute the harmonic mean of precision and recall over words, repeated ones counted."""
    words, reference = _words(text), _words(right)
    common = sum((Counter(words) & Counter(reference)).values())
    if not words or not reference:
        return float(words == reference)
    return 2 * common / (len(words) + len(reference))


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOT_JSON: Any = object()


def _words(text: str) -> list[str]:
    """Split as SQuAD's own script: lower case, without punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()))
    scores = [
        scorer.score_multi(rights, text) for text, rights in zip(texts, references, strict=True)
    ]
    return {
        name: mean(np.asarray([score[key].fmeasure for score in scores]))
        for name, key in names.items()
    }


def _corpus(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Compute BLEU and chrF as sacrebleu does, from its counts for each row."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    most = max(map(len, references))
    streams = [
        [rights[min(number, len(rights) - 1)] for rights in references] for number in range(most)
    ]
    metrics = {}
    for name, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        counts: Any = scorer._extract_corpus_statistics(list(texts), streams)
        metrics[name] = Metric(np.asarray(counts, np.float64), _score_of(scorer))
    return metrics


def _score_of(scorer: Any) -> Callable[[np.ndarray], np.ndarray]:
    def of(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        scores = [
            scorer._compute_score_from_stats([round(count) for count in draw]).score / 100
            for draw in flat.tolist()
        ]
        return np.asarray(scores).reshape(sums.shape[:-1])

    return of
