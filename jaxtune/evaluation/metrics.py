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
    truth: np.ndarray, chosen: np.ndarray, greedy: np.ndarray, count: int
) -> dict[str, Metric]:
    """Accuracy by likelihood and by generation, and macro F1.

    Args:
        truth: index of each row's class.
        chosen: index of its most likely class.
        greedy: whether the generated answer is the right one.
        count: of classes.

    """
    return {
        "accuracy": mean(truth == chosen),
        "accuracy_greedy": mean(greedy),
        "macro_f1": macro_f1(truth, chosen, count),
    }


def macro_f1(truth: np.ndarray, chosen: np.ndarray, count: int) -> Metric:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    classes = np.arange(count)
    is_true, is_chosen = (labels[:, None] == classes for labels in (truth, chosen))
    rows = np.concatenate([is_true & is_chosen, is_true, is_chosen], axis=1).astype(np.float64)

    def of(sums: np.ndarray) -> np.ndarray:
        hits, true, said = np.split(sums, 3, axis=-1)
        either = true + said
        scores = np.where(either > 0, 2 * hits / np.maximum(either, 1), 0.0)
        return scores.sum(axis=-1) / np.maximum((either > 0).sum(axis=-1), 1)

    return Metric(rows, of)


def confusion(truth: np.ndarray, chosen: np.ndarray, names: list[str]) -> dict[str, Any]:
    """How often each class was taken for each."""
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, (truth, chosen), 1)
    return {"classes": names, "rows_true_columns_predicted": table.tolist()}


def question_answering(texts: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Exact match and token F1, each with the right answer that is nearest (Rajpurkar et al.
    2016, SQuAD).
    """
    pairs = list(zip(texts, wanted, strict=True))
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


def generation(texts: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """ROUGE-1, -2 and -L (F1; Lin 2004), BLEU and chrF of the corpus (Papineni et al. 2002, Popovic
    2015), from 0 to 1.

    Where all wanted answers are JSON objects or lists, also how many answers are JSON and how many
    say the same.
    """
    found = {**_rouge(texts, wanted), **_corpus(texts, wanted)}
    if all(isinstance(_parsed(right), dict | list) for rights in wanted for right in rights):
        found |= json_validity(texts, wanted)
    return found


def json_validity(texts: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Share of answers that are JSON as they stand, and of those that have a wanted value,
    whatever the order of keys.
    """
    values = [_parsed(text) for text in texts]
    same = [
        value is not _NOT_JSON
        and any(_canonical(value) == _canonical(_parsed(right)) for right in rights)
        for value, rights in zip(values, wanted, strict=True)
    ]
    return {
        "json_valid": mean(np.asarray([value is not _NOT_JSON for value in values])),
        "json_match": mean(np.asarray(same)),
    }


def choice(
    scores: Sequence[np.ndarray], lengths: Sequence[np.ndarray], truth: Sequence[int]
) -> dict[str, Metric]:
    """Accuracy of the likeliest choice, and of the likeliest by its length in characters (acc_norm
    of the evaluation harness).

    Args:
        scores: log-probability of each choice, a row at a time.
        lengths: their characters.
        truth: index of the right one.

    """
    plain = [found.argmax() == right for found, right in zip(scores, truth, strict=True)]
    by_length = [
        (found / size).argmax() == right
        for found, size, right in zip(scores, lengths, truth, strict=True)
    ]
    return {"accuracy": mean(np.asarray(plain)), "accuracy_norm": mean(np.asarray(by_length))}


def normalized(text: str) -> str:
    """An answer without case, surrounding space and final full stop."""
    return text.strip().rstrip(".").strip().casefold()


def token_f1(text: str, right: str) -> float:
    """Harmonic mean of precision and recall over words, as often as they occur."""
    said, wanted = _words(text), _words(right)
    common = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * common / (len(said) + len(wanted))


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOT_JSON: Any = object()


def _words(text: str) -> list[str]:
    """As SQuAD's own script: lower case, without punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _rouge(texts: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, Metric]:
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()))
    scores = [scorer.score_multi(rights, text) for text, rights in zip(texts, wanted, strict=True)]
    return {
        name: mean(np.asarray([score[theirs].fmeasure for score in scores]))
        for name, theirs in names.items()
    }


def _corpus(texts: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """BLEU and chrF as sacrebleu has them, from its counts for each row."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    most = max(map(len, wanted))
    references = [
        [rights[min(number, len(rights) - 1)] for rights in wanted] for number in range(most)
    ]
    found = {}
    for name, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        counts: Any = scorer._extract_corpus_statistics(list(texts), references)
        found[name] = Metric(np.asarray(counts, np.float64), _score_of(scorer))
    return found


def _score_of(scorer: Any) -> Callable[[np.ndarray], np.ndarray]:
    def of(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        scores = [
            scorer._compute_score_from_stats([round(count) for count in draw]).score / 100
            for draw in flat.tolist()
        ]
        return np.asarray(scores).reshape(sums.shape[:-1])

    return of
