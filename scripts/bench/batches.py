"""The rows of a benchmark: random tokens, several texts in a row, and the quickstart's own."""

import tempfile
from pathlib import Path

import models

PACKED_LENGTH = 512  # tokens of a row in which the quickstart's rows are packed


def random_ids(rows, length):
    """Tokens [rows, length + 1]."""
    import numpy as np

    vocabulary = min(49152, (models.shape() or {}).get("vocab_size", 49152))
    return np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)


def texts_of(rows, length, packed):
    """Which text of its row each token belongs to, from 1, [rows, length]: one text or, packed,
    eight of unequal length.
    """
    import numpy as np

    if not packed:
        return np.ones((rows, length), np.int32)
    random, borders = np.random.default_rng(1), np.zeros((rows, length), np.int32)
    for row in borders:
        row[random.choice(np.arange(1, length), 7, replace=False)] = 1
    return 1 + np.cumsum(borders, axis=1, dtype=np.int32)


def positions_of(texts):
    """Each token's place in its text."""
    import numpy as np

    places = np.broadcast_to(np.arange(texts.shape[1], dtype=np.int32), texts.shape)
    first = np.diff(texts, axis=1, prepend=0) > 0
    return places - np.maximum.accumulate(np.where(first, places, 0), axis=1)


def news():
    """The quickstart's rows: the examples as prepared, and `(ids, supervised)` of each."""
    from jaxtune.config.schema import DataSection
    from jaxtune.data.prepare import prepare
    from jaxtune.weights.bundled import smollm2
    from jaxtune.weights.source import resolve
    from jaxtune.workflows.news import write_news

    with tempfile.TemporaryDirectory() as folder:
        trained, _ = write_news(Path(folder))
        examples = prepare(
            DataSection(train=str(trained), max_length=PACKED_LENGTH),
            resolve(str(smollm2())).tokenizer(),
        )
        return examples, [(list(item.ids), list(item.supervised)) for item in examples.items[:]]
