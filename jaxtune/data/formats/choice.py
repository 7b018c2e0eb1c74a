"""A question with choices, of which one is right, as ARC and MMLU write them."""

from collections.abc import Set

from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.fields import read_required, read_text
from jaxtune.data.formats.format import DataFormat
from jaxtune.data.sources.row import Row, RowError

_QUESTION_KEYS, _ANSWER_KEYS = ("prompt", "question"), ("answer", "answerKey", "label")


def _matches(keys: Set[str]) -> bool:
    """Return whether there are choices and a question, and no answer in words beside them."""
    return (
        "choices" in keys
        and bool(keys & set(_QUESTION_KEYS))
        and not keys & {"completion", "messages"}
    )


def _read(row: Row, answered: bool) -> Conversation:
    """Return the conversation in a row; see `DataFormat.read`.

    The choices are a list of texts, or lists of texts and of their labels, as ARC has them. The
    answer is an index from 0, a label or a text.
    """
    question = read_text(row, next((key for key in _QUESTION_KEYS if key in row.value), "prompt"))
    key = next((key for key in _ANSWER_KEYS if key in row.value), "answer")
    texts, labels = _read_choices(row)
    messages = [{"role": "user", "content": question}]
    if answered or key in row.value:
        right = texts[_index_of_answer(row, key, texts, labels)]
        messages.append({"role": "assistant", "content": right})
    return Conversation(row.location, messages, plain=True, choices=tuple(texts))


def _read_choices(row: Row) -> tuple[list[str], list[str]]:
    """Return the texts of the choices and their labels, which are A, B, ... where the row has
    none.
    """
    choices = read_required(row, "choices")
    texts, labels = (
        (choices.get("text"), choices.get("label"))
        if isinstance(choices, dict)
        else (choices, None)
    )
    if not (
        isinstance(texts, list)
        and len(texts) > 1
        and all(isinstance(text, str) and text for text in texts)
    ):
        raise RowError(row.location, "'choices' is not a list of at least two texts.")
    if isinstance(labels, list):
        return texts, [str(label) for label in labels]
    return texts, [chr(ord("A") + number) for number in range(len(texts))]


def _index_of_answer(row: Row, key: str, texts: list[str], labels: list[str]) -> int:
    answer = read_required(row, key)
    index: int | None = answer if type(answer) is int else None
    for names in (texts, labels):
        index = names.index(str(answer)) if index is None and str(answer) in names else index
    if index is None or not 0 <= index < len(texts):
        raise RowError(
            row.location,
            f"'{key}' is {answer!r}, neither the number of a choice from 0, nor its label, nor "
            "its text.",
        )
    return index


FORMAT = DataFormat("choice", _matches, _read, precedence=2)
