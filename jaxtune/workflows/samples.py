"""What a model says to the same prompts before, while and after it trains: `samples.jsonl` of a
run.
"""

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
from jaxtune.tracking.run_directory import SAMPLES
from jaxtune.training.callbacks import Callback
from jaxtune.training.inputs import comparison
from jaxtune.training.setup import Setup
from jaxtune.training.state import TrainState

_TOKENS = 64
_OPENING = 200  # characters of a text that are asked to be continued


class Samples(Callback):
    """Prompts with the answers wanted and the answers at several times.

    Args:
        parts: the run.
        directory: its directory.
        step: the step that it goes on from; answers of later ones, which a run that was killed
            wrote, are dropped.

    """

    def __init__(self, parts: Setup, directory: Path, step: int) -> None:
        self._parts, self._path = parts, directory / SAMPLES
        found = distributed.broadcast_from_main(
            lambda: read_jsonl(self._path) if self._path.exists() else None
        )
        self._known = found is not None
        self._rows: list[dict[str, Any]] = found or []
        for row in self._rows:
            row["during"] = [said for said in row.get("during", []) if said["step"] <= step]

    def before(self, state: TrainState) -> None:
        """The answers before training; those that an earlier call wrote stand."""
        if self._known:
            return
        self._rows = _prompts(self._parts)
        self._say(self._parts.model(state), lambda row, text: row.update(before=text, during=[]))

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> None:
        """Note the answers after this step, where it is not the last."""
        if not self._parts.config.train.samples or step == self._parts.num_steps:
            return
        self._say(
            self._parts.model(state),
            lambda row, text: row["during"].append({"step": step, "text": text}),
        )

    def after(self, model: CausalLM) -> None:
        """The answers of the trained model."""
        self._say(model, lambda row, text: row.update(after=text))

    def _say(self, model: CausalLM, note: Any) -> None:
        for row, text in zip(self._rows, _answers(self._parts, model, self._rows), strict=True):
            note(row, text)
        if distributed.is_main():
            write_jsonl(self._path, self._rows)


def _prompts(parts: Setup) -> list[dict[str, Any]]:
    """The first rows to evaluate on, or else to train on, as prompts; of a text, its first
    words.
    """
    data, found = parts.config.data, []
    for row in read_conversations(
        data, "train" if parts.eval_schedule is None else "eval", comparison=comparison(parts.config)
    ):
        if len(found) == parts.config.train.samples:
            break
        if row.label == REJECTED:
            continue
        prompt, wanted = row.prompt, row.answer
        if row.text:
            text = row.messages[0]["content"]
            prompt, wanted = (
                [{"role": "user", "content": text[:_OPENING]}],
                text[_OPENING : 3 * _OPENING],
            )
        sample = {
            "place": str(row.location),
            "prompt": prompt,
            "wanted": wanted,
            "plain": row.plain,
            "text": row.text,
        }
        sample |= {"options": dict(row.options)} if row.options else {}
        if prompt and _is_prompt(parts, sample):
            found.append(sample)
    return found


def _is_prompt(parts: Setup, sample: dict[str, Any]) -> bool:
    try:
        return bool(prompt_ids(parts.tokenizer, _asked(sample)))
    except UserError:  # a row that data.on_error=skip left out of training too
        return False


def _asked(sample: dict[str, Any]) -> Conversation:
    plain, text = sample.get("plain", True), sample.get("text", False)
    return Conversation(sample["place"], sample["prompt"], plain, text, sample.get("options", {}))


def _answers(parts: Setup, model: CausalLM, samples: list[dict[str, Any]]) -> list[str]:
    if not samples:
        return []
    ids = [prompt_ids(parts.tokenizer, _asked(sample)) for sample in samples]
    engine = Engine(model, parts.source.stop_ids(), batch=max(len(ids), 2))
    return parts.tokenizer.batch_decode(engine.generate(ids, _TOKENS), skip_special_tokens=True)
