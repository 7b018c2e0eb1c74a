"""Evaluation of a model on a file: loss and perplexity always, and the figures of the task that
the answers are for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.config.schema import DataSection
from jaxtune.core.distributed import fetch
from jaxtune.core.errors import UserError, listed
from jaxtune.data.batch import Batch
from jaxtune.data.chat.tokenize import ConversationTokenizer, prompt_ids
from jaxtune.data.examples import Examples
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.loader import BatchSchedule
from jaxtune.data.packing import Layout
from jaxtune.data.prepare import prepare, read_conversations
from jaxtune.data.sources.row import RowError, RowErrors
from jaxtune.evaluation import metrics
from jaxtune.evaluation.likelihood import likelihoods
from jaxtune.evaluation.statistics import Metric, compared, ratio
from jaxtune.evaluation.tasks import (
    CHOICE,
    CLASSIFICATION,
    LM,
    QA,
    TASKS,
    accepted,
    check,
    classes,
    detect,
)
from jaxtune.inference.engine import Engine
from jaxtune.inference.programs import Prefilled
from jaxtune.inference.text import TextGenerator
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.objective import DETERMINISTIC, hidden_and_head
from jaxtune.objectives.sequence_log_probs import token_log_probs
from jaxtune.tracking.metrics_log import perplexity

_EXTRA_TOKENS = 4  # that a class's generated answer may have more than the longest class
_LONGER, _MORE_TOKENS = (
    1.5,
    16,
)  # how much longer than the longest wanted answer a generated one may be

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        task: one of `TASKS`; `auto` goes by the answers.
        batch: rows computed together; it changes no number.
        max_new_tokens: of a generated answer; None goes by the longest one wanted.
        progress: called with steps done and steps in all.

    """

    task: str = "auto"
    batch: int = 32
    max_new_tokens: int | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        task: what was evaluated.
        rows: how many rows.
        loss: nats per supervised token.
        supervised_tokens: how many.
        metrics: the task's other figures.
        further: what has no interval: counts, the confusion matrix.
        predictions: of each row where it stands, what was wanted and what the model said.

    """

    task: str
    rows: int
    loss: Metric
    supervised_tokens: int
    metrics: dict[str, Metric] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """All of it as `jaxtune eval --json` has it."""
        loss, bounds = self.loss.value, self.loss.interval()
        intervals = {
            "loss": bounds,
            "perplexity": [round(perplexity(bound), 6) for bound in bounds],
        }
        return {
            "task": self.task,
            "rows": self.rows,
            "loss": loss,
            "perplexity": perplexity(loss),
            "supervised_tokens": self.supervised_tokens,
            **{name: metric.value for name, metric in self.metrics.items()},
            **self.further,
            "intervals": intervals
            | {name: metric.interval() for name, metric in self.metrics.items()},
        }

    def against(self, base: "Evaluation") -> dict[str, Any]:
        """What this one has more than `base`, of the same rows; see `statistics.compared`."""
        mine, theirs = ({"loss": one.loss, **one.metrics} for one in (self, base))
        return {name: compared(theirs[name], mine[name]) for name in mine if name in theirs}


def evaluate(
    model: CausalLM,
    tokenizer: Any,
    stop_ids: Sequence[int],
    data: DataSection,
    asked: EvalOptions | None = None,
) -> Evaluation:
    """Figures of a model on a file of answered rows.

    Args:
        model: with or without an adapter.
        tokenizer: its tokenizer.
        stop_ids: tokens that end an answer.
        data: its evaluation part.
        asked: the task and how it is computed.

    Raises:
        UserError: a bad file, or a task that the file does not fit.

    """
    asked = asked or EvalOptions()
    if asked.task not in TASKS:
        raise UserError(f"--task {asked.task}: unknown; there are {', '.join(TASKS)}.")
    problems = RowErrors(data.on_error)
    rows = list(read_conversations(data, "eval", problems))
    name = ", ".join(entry.source for entry in data.entries("eval") or data.entries("train"))
    if not rows:
        raise UserError(
            f"{name} has no row to evaluate on. {listed(problems.messages, 3)}".rstrip()
        )
    task = detect(rows) if asked.task == "auto" else asked.task
    check(task, rows)
    judge = _Judge(model, tokenizer, stop_ids, data, rows, replace(asked, task=task))
    found = judge.by_likelihood(name) if task in (CLASSIFICATION, CHOICE) else judge.by_text()
    return (
        replace(found, further={"bad": len(problems.messages), **found.further})
        if problems.messages
        else found
    )


class _Judge:
    """A model before the rows of a file."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        stop_ids: Sequence[int],
        data: DataSection,
        rows: list[Conversation],
        asked: EvalOptions,
    ) -> None:
        self.model, self.tokenizer, self.data, self.rows, self.asked = (
            model,
            tokenizer,
            data,
            rows,
            asked,
        )
        self.engine = Engine(model, stop_ids, _even(len(rows), asked.batch))

    def by_text(self) -> Evaluation:
        """The loss on the answers, and of `qa` and `generation` what is generated."""
        asked, passes = self.asked, 1 if self.asked.task == LM else 2
        text = any(row.text for row in self.rows)  # read in windows of the length it was trained in
        data = (
            self.data
            if text
            else self.data.model_copy(update={"max_length": self.model.config.max_positions})
        )
        examples = prepare(data, self.tokenizer, "eval")
        self.model.config.check_tokens([[examples.largest_token]])
        tell = asked.progress or (lambda done, total: None)
        losses, weights = row_losses(
            self.model,
            examples,
            self.asked.batch,
            lambda done, total: tell(done * len(self.rows) // total, passes * len(self.rows)),
        )
        counts = {
            "truncated": len(examples.truncated),
            "dropped": len(examples.unanswered) + len(examples.cut_off),
        }
        found = Evaluation(
            asked.task, len(self.rows), ratio(losses, weights), int(weights.sum()), {}, counts
        )
        if asked.task == LM:
            return found
        texts = self._generated(lambda done: tell(len(self.rows) + done, passes * len(self.rows)))
        wanted = [accepted(row) for row in self.rows]
        judged = metrics.question_answering if asked.task == QA else metrics.generation
        return replace(
            found, metrics=judged(texts, wanted), predictions=self._predictions({"said": texts})
        )

    def _generated(self, progress: Callable[[int], None]) -> list[str]:
        longest = max(
            len(ids)
            for ids in self.tokenizer([row.answer for row in self.rows], add_special_tokens=False)[
                "input_ids"
            ]
        )
        most = self.asked.max_new_tokens or int(_LONGER * longest) + _MORE_TOKENS
        prompts = [prompt_ids(self.tokenizer, row) for row in self.rows]
        return [
            said.text
            for said in TextGenerator(self.engine, self.tokenizer).answers(
                prompts, most, progress=progress
            )
        ]

    def by_likelihood(self, name: str) -> Evaluation:
        """The likeliest of a row's answers; of classes also what is generated. Each prompt is
        read once.
        """
        names = classes(self.rows, name) if self.asked.task == CLASSIFICATION else []
        options = [names or list(row.choices) for row in self.rows]
        prompts = [prompt_ids(self.tokenizer, row) for row in self.rows]
        tokenizer = ConversationTokenizer(self.tokenizer, "last")
        pieces = list(zip(self.rows, prompts, options, strict=True))
        candidates = [
            _continuations(tokenizer, row, prompt, texts) for row, prompt, texts in pieces
        ]
        most = (
            max(len(tokens) for row in candidates for tokens in row) + _EXTRA_TOKENS if names else 0
        )
        texts = [""] * len(self.rows)

        def generated(part: Sequence[int], read: Prefilled) -> None:
            said = self.tokenizer.batch_decode(
                self.engine.continue_from(read, len(part), most), skip_special_tokens=True
            )
            for number, text in zip(part, said, strict=True):
                texts[number] = text

        found = likelihoods(
            self.engine,
            prompts,
            candidates,
            most,
            generated if names else None,
            self.asked.progress,
        )
        scores = [likelihood.log_probs for likelihood in found]
        truth = [
            found.index(row.answer or "") for found, row in zip(options, self.rows, strict=True)
        ]
        losses = -np.asarray([found[right] for found, right in zip(scores, truth, strict=True)])
        weights = np.asarray(
            [len(row[right]) for row, right in zip(candidates, truth, strict=True)], np.float64
        )
        chosen = [int(found.argmax()) for found in scores]
        said: dict[str, list[Any]] = {
            "chosen": [found[pick] for found, pick in zip(options, chosen, strict=True)]
        }
        said["log_probs"] = [[round(float(score), 4) for score in found] for found in scores]
        figures = (
            self._class_figures(truth, chosen, texts, names)
            if names
            else self._choice_figures(options, scores, truth)
        )
        if names:
            said["said"] = texts
        further = (
            {"confusion": metrics.confusion(np.asarray(truth), np.asarray(chosen), names)}
            if names
            else {}
        )
        whole = Evaluation(
            self.asked.task,
            len(self.rows),
            ratio(losses, weights),
            int(weights.sum()),
            figures,
            further,
        )
        return replace(whole, predictions=self._predictions(said))

    def _class_figures(
        self, truth: list[int], chosen: list[int], texts: list[str], names: list[str]
    ) -> dict[str, Metric]:
        same = [
            metrics.normalized(text) == metrics.normalized(row.answer or "")
            for text, row in zip(texts, self.rows, strict=True)
        ]
        return metrics.classification(
            np.asarray(truth), np.asarray(chosen), np.asarray(same), len(names)
        )

    def _choice_figures(
        self, options: list[list[str]], scores: list[np.ndarray], truth: list[int]
    ) -> dict[str, Metric]:
        return metrics.choice(
            scores, [np.asarray([len(text) for text in found], float) for found in options], truth
        )

    def _predictions(self, said: dict[str, list[Any]]) -> list[dict[str, Any]]:
        return [
            {
                "place": str(row.location),
                "prompt": row.prompt,
                "wanted": row.answer,
                **{name: values[number] for name, values in said.items()},
            }
            for number, row in enumerate(self.rows)
        ]


def _even(rows: int, batch: int) -> int:
    """As many rows together that there are no more batches, the last one as full as the others."""
    return -(-rows // -(-rows // batch))


def row_losses(
    model: CausalLM, examples: Examples, batch: int, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`(sum of token losses, supervised tokens)` of every example, in nats, float64."""
    graph, state = nnx.split(model)
    lengths = examples.lengths
    layout = Layout(batch, int(lengths.max()), packing=False, shuffle=False, seed=0)
    losses, weights = np.zeros(len(lengths)), np.zeros(len(lengths))
    plan, done = BatchSchedule(examples, layout, 1), 0
    for index in range(len(plan)):
        rows, arrays = plan.rows(index), plan.batch(index)
        found = fetch(_losses_by_row(graph, state, arrays))
        losses[done : done + len(rows)] = found[: len(rows)]
        weights[done : done + len(rows)] = arrays.weights.sum(axis=1)[: len(rows)]
        done += len(rows)
        if progress:
            progress(done, len(lengths))
    return losses, weights


def _by_row(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> jax.Array:
    model = nnx.merge(graph, state)
    found = token_log_probs(
        *hidden_and_head(model, batch, DETERMINISTIC), batch.target_ids, model.config.logit_softcap
    )
    return -jnp.sum(found * batch.weights, axis=1)


_losses_by_row = jax.jit(_by_row, static_argnums=0)


def _continuations(
    tokenizer: ConversationTokenizer, row: Conversation, prompt: list[int], answers: Sequence[str]
) -> list[list[int]]:
    """For each answer the ids from the end of the prompt through the end of turn, were it the
    answer.
    """
    chats = [
        replace(row, messages=[*row.prompt, {"role": "assistant", "content": answer}])
        for answer in answers
    ]
    found = []
    for documents in tokenizer(chats):
        if isinstance(documents, RowError):
            raise documents
        document = documents[-1]
        ids = document.ids[: document.spans[-1].end].tolist()
        if ids[: len(prompt)] != prompt:
            raise UserError(
                f"{row.location}: the chat template's prompt is not a prefix of the answered chat, "
                "so an answer cannot be scored."
            )
        found.append(ids[len(prompt) :])
    return found
