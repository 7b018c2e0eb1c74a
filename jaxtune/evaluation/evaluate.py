"""Evaluation of a model on a file: loss and perplexity always, and the metrics of its task."""

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
from jaxtune.core.tokenizer import Tokenizer
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
from jaxtune.evaluation.statistics import Metric, compare, ratio
from jaxtune.evaluation.tasks import (
    CHOICE,
    CLASSIFICATION,
    LM,
    QA,
    TASKS,
    accepted_answers,
    check_task,
    detect_task,
    list_classes,
)
from jaxtune.inference.engine import Engine
from jaxtune.inference.programs import Prefilled
from jaxtune.inference.text import TextGenerator
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.objective import DETERMINISTIC, hidden_and_head
from jaxtune.objectives.sequence_log_probs import token_log_probs
from jaxtune.tracking.metrics_log import perplexity

_EXTRA_TOKENS = 4  # that a class's generated answer may have more than the longest class
_LENGTH_FACTOR, _MORE_TOKENS = 1.5, 16  # of a generated answer, over the longest reference

EvalProgress = Callable[[int, int], None]
"""Called with the number of steps done, and of all."""


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        task: one of `TASKS`; `auto` goes by the answers.
        batch: rows computed together; it changes no number.
        max_new_tokens: of a generated answer; None goes by the longest reference.
        progress: see `EvalProgress`.

    """

    task: str = "auto"
    batch: int = 32
    max_new_tokens: int | None = None
    progress: EvalProgress | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        task: what was evaluated.
        rows: how many rows.
        loss: nats per supervised token.
        supervised_tokens: how many.
        metrics: the task's other metrics.
        further: what has no interval: counts, the confusion matrix.
        predictions: for each row its place, its reference and what the model answered.

    """

    task: str
    rows: int
    loss: Metric
    supervised_tokens: int
    metrics: dict[str, Metric] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it but the predictions, as `jaxtune eval --json` writes it."""
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

    def compare(self, base: "Evaluation") -> dict[str, Any]:
        """Compare each metric with `base`'s on the same rows; see `statistics.compare`."""
        mine = {"loss": self.loss, **self.metrics}
        others = {"loss": base.loss, **base.metrics}
        return {name: compare(others[name], mine[name]) for name in mine if name in others}


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    data: DataSection,
    options: EvalOptions | None = None,
) -> Evaluation:
    """Evaluate a model on a file of answered rows.

    Args:
        model: with or without an adapter.
        tokenizer: its tokenizer.
        stop_ids: tokens that end an answer.
        data: its evaluation part.
        options: the task and how it is computed.

    Raises:
        UserError: a bad file, or a task that the file does not fit.

    """
    options = options or EvalOptions()
    if options.task not in TASKS:
        raise UserError(f"--task {options.task}: unknown; there are {', '.join(TASKS)}.")
    errors = RowErrors(data.on_error)
    rows = list(read_conversations(data, "eval", errors))
    name = ", ".join(entry.source for entry in data.entries("eval") or data.entries("train"))
    if not rows:
        raise UserError(f"{name} has no row to evaluate on. {listed(errors.messages, 3)}".rstrip())
    task = detect_task(rows) if options.task == "auto" else options.task
    check_task(task, rows)
    evaluator = _RowEvaluator(
        model, tokenizer, stop_ids, data=data, rows=rows, options=replace(options, task=task)
    )
    by_likelihood = task in (CLASSIFICATION, CHOICE)
    result = evaluator.by_likelihood(name) if by_likelihood else evaluator.by_text()
    if errors.messages:
        result = replace(result, further={"bad": len(errors.messages), **result.further})
    return result


class _RowEvaluator:
    """The evaluation of one model on the rows of a file."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        *,
        data: DataSection,
        rows: list[Conversation],
        options: EvalOptions,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.data, self.rows, self.options = data, rows, options
        self.engine = Engine(model, stop_ids, _even_batch(len(rows), options.batch))

    def by_text(self) -> Evaluation:
        """Compute the loss on the answers, and for `qa` and `generation` generate them."""
        options, count = self.options, len(self.rows)
        passes = 1 if options.task == LM else 2
        data = self.data
        if not any(row.text for row in self.rows):  # texts are read in windows as in training
            data = data.model_copy(update={"max_length": self.model.config.max_positions})
        examples = prepare(data, self.tokenizer, "eval")
        self.model.config.check_tokens([[examples.largest_token]])
        report = options.progress or (lambda done, total: None)
        losses, weights = row_losses(
            self.model,
            examples,
            options.batch,
            lambda done, total: report(done * count // total, passes * count),
        )
        counts = {
            "truncated": len(examples.truncated),
            "dropped": len(examples.unanswered) + len(examples.cut_off),
        }
        result = Evaluation(
            options.task, count, ratio(losses, weights), int(weights.sum()), {}, counts
        )
        if options.task == LM:
            return result
        texts = self._generate(lambda done: report(count + done, passes * count))
        references = [accepted_answers(row) for row in self.rows]
        score = metrics.question_answering if options.task == QA else metrics.generation
        return replace(
            result,
            metrics=score(texts, references),
            predictions=self._predictions({"said": texts}),
        )

    def _generate(self, progress: Callable[[int], None]) -> list[str]:
        references = self.tokenizer([row.answer for row in self.rows], add_special_tokens=False)
        longest = max(map(len, references["input_ids"]))
        limit = self.options.max_new_tokens or int(_LENGTH_FACTOR * longest) + _MORE_TOKENS
        prompts = [prompt_ids(self.tokenizer, row) for row in self.rows]
        generator = TextGenerator(self.engine, self.tokenizer)
        return [answer.text for answer in generator.answers(prompts, limit, progress=progress)]

    def by_likelihood(self, name: str) -> Evaluation:
        """Find the likeliest of each row's answers; for classes also generate an answer.

        Each prompt is read once.
        """
        names = list_classes(self.rows, name) if self.options.task == CLASSIFICATION else []
        options = [names or list(row.choices) for row in self.rows]
        prompts = [prompt_ids(self.tokenizer, row) for row in self.rows]
        tokenizer = ConversationTokenizer(self.tokenizer, "last")
        candidates = [
            _continuations(tokenizer, row, prompt, answers)
            for row, prompt, answers in zip(self.rows, prompts, options, strict=True)
        ]
        longest = max(len(tokens) for row in candidates for tokens in row)
        limit = longest + _EXTRA_TOKENS if names else 0
        texts = [""] * len(self.rows)

        def generate(part: Sequence[int], prefilled: Prefilled) -> None:
            tokens = self.engine.continue_from(prefilled, len(part), limit)
            answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for number, text in zip(part, answers, strict=True):
                texts[number] = text

        scores = [
            likelihood.log_probs
            for likelihood in likelihoods(
                self.engine,
                prompts,
                candidates,
                room=limit,
                then=generate if names else None,
                progress=self.options.progress,
            )
        ]
        truth = [
            answers.index(row.answer or "") for answers, row in zip(options, self.rows, strict=True)
        ]
        return self._scored(options, scores, truth, _lengths(candidates), texts if names else None)

    def _scored(
        self,
        options: list[list[str]],
        scores: list[np.ndarray],
        truth: list[int],
        lengths: list[list[int]],
        texts: list[str] | None,
    ) -> Evaluation:
        """Return the evaluation by the likelihoods of each row's options.

        Args:
            options: the answers of each row.
            scores: their log-probabilities.
            truth: which of them is right.
            lengths: their tokens.
            texts: where the options are classes, what was generated.

        """
        losses = -np.asarray([row[right] for row, right in zip(scores, truth, strict=True)])
        weights = np.asarray(
            [row[right] for row, right in zip(lengths, truth, strict=True)], np.float64
        )
        likeliest = [int(row.argmax()) for row in scores]
        answers: dict[str, list[Any]] = {
            "chosen": [row[pick] for row, pick in zip(options, likeliest, strict=True)],
            "log_probs": [[round(float(score), 4) for score in row] for row in scores],
        }
        if texts is None:
            characters = [np.asarray([len(text) for text in row], float) for row in options]
            task_metrics, further = metrics.choice(scores, characters, truth), {}
        else:
            answers["said"] = texts
            right, predicted = np.asarray(truth), np.asarray(likeliest)
            task_metrics = metrics.classification(
                right, predicted, self._generated_right(texts), len(options[0])
            )
            further = {"confusion": metrics.confusion(right, predicted, options[0])}
        return Evaluation(
            self.options.task,
            len(self.rows),
            ratio(losses, weights),
            int(weights.sum()),
            task_metrics,
            further,
            self._predictions(answers),
        )

    def _generated_right(self, texts: list[str]) -> np.ndarray:
        return np.asarray(
            [
                metrics.normalized(text) == metrics.normalized(row.answer or "")
                for text, row in zip(texts, self.rows, strict=True)
            ]
        )

    def _predictions(self, answers: dict[str, list[Any]]) -> list[dict[str, Any]]:
        return [
            {
                "place": str(row.location),
                "prompt": row.prompt,
                "wanted": row.answer,
                **{name: values[number] for name, values in answers.items()},
            }
            for number, row in enumerate(self.rows)
        ]


def _lengths(candidates: list[list[list[int]]]) -> list[list[int]]:
    return [[len(tokens) for tokens in row] for row in candidates]


def _even_batch(rows: int, batch: int) -> int:
    """Return the smallest batch that needs no more batches, so that the last one is full too."""
    return -(-rows // -(-rows // batch))


def row_losses(
    model: CausalLM, examples: Examples, batch: int, progress: EvalProgress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the sum of token losses and the supervised tokens of every example.

    Losses are in nats, float64.
    """
    graph, state = nnx.split(model)
    lengths = examples.lengths
    layout = Layout(batch, int(lengths.max()), packing=False, shuffle=False, seed=0)
    losses, weights = np.zeros(len(lengths)), np.zeros(len(lengths))
    schedule, done = BatchSchedule(examples, layout, 1), 0
    for index in range(len(schedule)):
        rows, arrays = schedule.rows(index), schedule.batch(index)
        batch_losses = fetch(_losses_by_row(graph, state, arrays))
        losses[done : done + len(rows)] = batch_losses[: len(rows)]
        weights[done : done + len(rows)] = arrays.weights.sum(axis=1)[: len(rows)]
        done += len(rows)
        if progress:
            progress(done, len(lengths))
    return losses, weights


def _by_row(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> jax.Array:
    model = nnx.merge(graph, state)
    log_probs = token_log_probs(
        *hidden_and_head(model, batch, DETERMINISTIC), batch.target_ids, model.config.logit_softcap
    )
    return -jnp.sum(log_probs * batch.weights, axis=1)


_losses_by_row = jax.jit(_by_row, static_argnums=0)


def _continuations(
    tokenizer: ConversationTokenizer, row: Conversation, prompt: list[int], answers: Sequence[str]
) -> list[list[int]]:
    """Return the ids after the prompt, through the end of turn, for each possible answer."""
    chats = [
        replace(row, messages=[*row.prompt, {"role": "assistant", "content": answer}])
        for answer in answers
    ]
    continuations = []
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
        continuations.append(ids[len(prompt) :])
    return continuations
