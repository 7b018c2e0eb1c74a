"""The task of a file, by its answers."""

from collections import Counter
from collections.abc import Sequence

from jaxtune.core.errors import UserError
from jaxtune.data.formats.conversation import Conversation

LM, CLASSIFICATION, QA, GENERATION, CHOICE = "lm", "classification", "qa", "generation", "choice"
TASKS = ("auto", LM, CLASSIFICATION, QA, GENERATION, CHOICE)
_MAX_CLASSES, _MAX_WORDS = 50, 5
_MAX_CHARACTERS = 60  # for languages that put no spaces between words


def detect_task(rows: Sequence[Conversation]) -> str:
    """Find the task that suits the rows.

    `choice` where they have choices, `classification` where the answers are few, short and
    repeated, `qa` where they are short, else `lm`; `generation`, which takes long, is never
    found by itself.
    """
    if all(row.choices for row in rows):
        return CHOICE
    answers = Counter(row.answer for row in rows)
    if None in answers or any(row.text for row in rows):
        return LM
    if not all(
        len(answer) <= _MAX_CHARACTERS and len(answer.split()) <= _MAX_WORDS
        for answer in answers
        if answer is not None
    ):
        return LM
    few = 2 <= len(answers) <= min(_MAX_CLASSES, len(rows) // 2)
    return CLASSIFICATION if few else QA


def check_task(task: str, rows: Sequence[Conversation]) -> None:
    """Check that the rows fit a task.

    Raises:
        UserError: a row does not end with an answer, or has no choices.

    """
    for row in rows:
        if task != LM and (row.answer is None or row.text):
            raise UserError(
                f"{row.location}: the row does not end with an assistant's answer, which the task "
                f"{task} needs."
            )
        if task == CHOICE and row.answer not in row.choices:
            raise UserError(
                f"{row.location}: the row has no 'choices', which the task {task} needs."
            )


def list_classes(rows: Sequence[Conversation], path: str) -> list[str]:
    """Return the distinct answers of a file, sorted.

    Raises:
        UserError: there is only one.

    """
    classes = sorted({row.answer for row in rows if row.answer is not None})
    if len(classes) < 2:
        raise UserError(
            f"{path}: all answers are the same, so there is nothing to classify. Use --task lm."
        )
    return classes


def accepted_answers(row: Conversation) -> list[str]:
    """Return all right answers of a row, each once."""
    return list(dict.fromkeys([row.answer or "", *row.accepted]))
