"""Batches of preferences made by hand: answers to prompts, their labels, side by side."""

import numpy as np

from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED
from tests.support.steps import batch_of

PAIRS = 3


def answers(count, seed=0):
    """Rows of (ids, supervised): a prompt that is not supervised and an answer that is; two
    after one another share the prompt.
    """
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = random.integers(0, 256, random.integers(2, 6))
        for _ in range(2):
            answer = random.integers(0, 256, random.integers(2, 8))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            found.append((ids, np.arange(len(ids)) >= len(prompt)))
    return found


def labels_of(name):
    """Return the labels of `PAIRS` pairs of answers for the objective of this name."""
    if name != "kto":
        return [CHOSEN, REJECTED] * PAIRS
    return [CHOSEN, MISMATCHED, REJECTED, MISMATCHED, REJECTED, MISMATCHED]


def side_by_side(rows, labels, packed=False, rows_in_batch=None):
    """Two answers a row of the batch, or all in one row."""
    length = 2 * max(len(ids) for ids, _ in rows) * (len(rows) // 2 if packed else 1)
    pairs = [rows] if packed else [rows[k : k + 2] for k in range(0, len(rows), 2)]
    parts = [batch_of(pair, length=length, packed=True) for pair in pairs]
    assert all(len(part.input_ids) == 1 for part in parts)
    whole = type(parts[0])(
        *(np.concatenate(fields) for fields in list(zip(*parts, strict=True))[:5])
    )
    found = np.array([labels] if packed else np.reshape(labels, (-1, 2)), np.int32)
    if packed:
        found = np.pad(found, ((0, 0), (0, 4)))  # segments that are not there
    missing = (rows_in_batch or len(found)) - len(found)
    return type(whole)(*(np.pad(part, ((0, missing), (0, 0))) for part in (*whole[:5], found)))
