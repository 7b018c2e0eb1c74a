"""Answers to be compared: pairs of a preferred and a rejected one, or single ones that are labeled
good or bad.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from jaxtune.data.batch import CHOSEN, REJECTED
from jaxtune.data.formats import preference
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.registry import read_conversation
from jaxtune.data.sources.row import Row, RowError

AnswerComparison = Literal["pairs", "labels"]
"""What an objective compares: two answers to one prompt, or answers with labels (a pair being
one good and one bad).
"""

LABEL = "label"


def read_answers(
    row: Row, kind: str, columns: Mapping[str, str], comparison: AnswerComparison
) -> list[Conversation]:
    """Return the answers of a row, each with its prompt and its label.

    Args:
        row: the parsed row.
        kind: a format, or `auto` to go by the row's keys.
        columns: see `registry.read_conversation`.
        comparison: what the objective compares.

    Raises:
        RowError: neither a pair, nor a labeled answer where labels are compared.

    """
    if "chosen" in row.value or "chosen" in columns or kind == preference.FORMAT.name:
        pair = preference.read_pair(row, columns)
        if pair.chosen.answer == pair.rejected.answer:
            raise RowError(row.location, "'chosen' and 'rejected' are the same answer.")
        return [replace(pair.chosen, label=CHOSEN), replace(pair.rejected, label=REJECTED)]
    if comparison == "pairs":
        raise RowError(
            row.location,
            "no pair of answers. The objective needs 'prompt', 'chosen' and 'rejected' (see "
            "data.columns).",
        )
    good = row.value.get(columns.get(LABEL, LABEL))
    if good not in (True, False, 0, 1):
        raise RowError(
            row.location,
            f"'{LABEL}' must be true for a good answer or false for a bad one, or there must be "
            "'chosen' and 'rejected'.",
        )
    others = {key: column for key, column in columns.items() if key != LABEL}
    answer = read_conversation(row, kind, columns=others)
    return [replace(answer, label=CHOSEN if good else REJECTED)]
