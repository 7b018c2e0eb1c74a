"""A model's answers to the same prompts before, during and after training: `samples.jsonl` of a
run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.core import distributed
from jaxtune.core.errors import UserError
from jaxtune.core.files import read_jsonl, write_jsonl
from jaxtune.data.batch import REJECTED
from jaxtune.data.chat.tokenize import prompt_ids
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.prepare import read_conversations
from jaxtune.inference.engine import Engine
from jaxtune.models.decoder import CausalLM
from jaxtune.tracking.ownership import SAMPLES
from jaxtune.training.callbacks import Callback
from jaxtune.training.inputs import comparison
from jaxtune.training.setup import Setup
from jaxtune.training.state import TrainState

_MAX_NEW_TOKENS = 64
_OPENING = 200  # characters of a text that the model is asked to continue

Row = dict[str, Any]


class Samples(Callback):
    """Prompts with their reference answers, and the model's answers at several times.

    Args:
        setup: the run.
        directory: its directory.
        step: the step that it is continued from; answers of later ones, which a run that was killed
            wrote, are removed.

    """

    def __init__(self, setup: Setup, directory: Path, step: int) -> None:
        self._setup, self._path = setup, directory / SAMPLES
        rows = distributed.broadcast_from_main(lambda: _read(self._path))
        self.is_continued = rows is not None
        self._rows: list[Row] = rows or []
        for row in self._rows:
            row["during"] = [answer for answer in row.get("during", []) if answer["step"] <= step]

    def before(self, state: TrainState) -> None:
        """Record the answers before training; those that an earlier call wrote stand."""
        if self.is_continued:
            return
        self._rows = _choose_prompts(self._setup)
        self._record(self._setup.model(state), lambda row, text: row.update(before=text, during=[]))

    def has_answers_of(self, step: int) -> bool:
        """Return whether answers during training are recorded of this step."""
        return any(answer["step"] == step for row in self._rows for answer in row["during"])

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> None:
        """Record the answers after this step, unless it is the last."""
        if not self._setup.config.train.samples or step == self._setup.num_steps:
            return
        self._record(
            self._setup.model(state),
            lambda row, text: row.update(during=_added(row["during"], step, text)),
        )

    def after(self, model: CausalLM) -> None:
        """Record the answers of the trained model."""
        self._record(model, lambda row, text: row.update(after=text))

    def _record(self, model: CausalLM, add: Callable[[Row, str], None]) -> None:
        texts = _generate_answers(self._setup, model, self._rows)
        for row, text in zip(self._rows, texts, strict=True):
            add(row, text)
        if distributed.is_main():
            write_jsonl(self._path, self._rows)


def _read(path: Path) -> list[Row] | None:
    """Return the rows that an earlier call wrote; None where there are none, or not all of them."""
    try:
        rows = read_jsonl(path)
        is_whole = all(isinstance(row["before"], str) and row["prompt"] for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if is_whole else None


def _added(answers: list[Row], step: int, text: str) -> list[Row]:
    """Return the answers during training with the one of this step."""
    return [*(answer for answer in answers if answer["step"] != step), {"step": step, "text": text}]


def _choose_prompts(setup: Setup) -> list[Row]:
    """Return the first rows of the evaluation data, else of the training data, as prompts."""
    config, rows = setup.config, []
    part = "train" if setup.eval_schedule is None else "eval"
    for conversation in read_conversations(config.data, part, comparison=comparison(config)):
        if len(rows) == config.train.samples:
            break
        if conversation.label == REJECTED:
            continue
        row = _to_row(conversation)
        if row["prompt"] and _is_prompt(setup, row):
            rows.append(row)
    return rows


def _to_row(conversation: Conversation) -> Row:
    """Return a conversation as a prompt with its answer; of a text, its first words and the next
    ones.
    """
    prompt, answer = conversation.prompt, conversation.answer
    if conversation.text:
        text = conversation.messages[0]["content"]
        prompt = [{"role": "user", "content": text[:_OPENING]}]
        answer = text[_OPENING : 3 * _OPENING]
    row = {
        "place": str(conversation.location),
        "prompt": prompt,
        "wanted": answer,
        "plain": conversation.plain,
        "text": conversation.text,
    }
    return row | ({"options": dict(conversation.options)} if conversation.options else {})


def _is_prompt(setup: Setup, row: Row) -> bool:
    try:
        return bool(prompt_ids(setup.tokenizer, _to_conversation(row)))
    except UserError:  # a row that data.on_error=skip left out of training too
        return False


def _to_conversation(row: Row) -> Conversation:
    plain, text = row.get("plain", True), row.get("text", False)
    return Conversation(row["place"], row["prompt"], plain, text, row.get("options", {}))


def _generate_answers(setup: Setup, model: CausalLM, rows: list[Row]) -> list[str]:
    if not rows:
        return []
    ids = [prompt_ids(setup.tokenizer, _to_conversation(row)) for row in rows]
    engine = Engine(model, setup.stop_ids, batch=max(len(ids), 2))
    answers = engine.generate(ids, _MAX_NEW_TOKENS)
    return setup.tokenizer.batch_decode(answers, skip_special_tokens=True)
