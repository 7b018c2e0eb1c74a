"""Evaluation of a model on a file: loss and perplexity always, accuracy where the answers are classes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError, listed
from jaxtune.core.processes import fetch
from jaxtune.data.chat import Tokeniser, prompt_ids
from jaxtune.data.examples import Examples
from jaxtune.data.formats import Conversation
from jaxtune.data.loader import Plan
from jaxtune.data.packing import Layout
from jaxtune.data.prepare import conversations, prepare
from jaxtune.data.row import BadRow, Problems
from jaxtune.evals.tasks import CLASSIFICATION, TASKS, classes, classification_metrics, detect, interval, normalised
from jaxtune.generate.engine import Engine
from jaxtune.generate.sampling import Sampling
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.answers import token_log_probs
from jaxtune.objectives.objective import PLAIN, Batch, read
from jaxtune.train.metrics import perplexity

_EXTRA_TOKENS = 4


def evaluate(
    model: CausalLM,
    tokenizer: Any,
    stop_ids: Sequence[int],
    data: DataSection,
    task: str = "auto",
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Metrics of a model on a file of answered rows.

    Args:
        model: with or without an adapter.
        tokenizer: its tokenizer.
        stop_ids: tokens that end an answer.
        data: its evaluation part.
        task: `lm`, `classification`, or `auto` to go by the answers.
        batch: rows computed together; it changes no number.
        progress: called with rows done and rows in all.

    Raises:
        UserError: a bad file, or a task that the file does not fit.

    """
    if task not in TASKS:
        raise UserError(f"--task {task}: unknown; there are {', '.join(TASKS)}.")
    problems = Problems(data.on_error)
    rows = list(conversations(data, "eval", problems))
    name = ", ".join(entry.source for entry in data.entries("eval") or data.entries("train"))
    if not rows:
        raise UserError(f"{name} has no row to evaluate on. {listed(problems.found, 3)}".rstrip())
    task = detect(rows) if task == "auto" else task
    if task == CLASSIFICATION:
        result = _classification(model, tokenizer, stop_ids, rows, name, batch, progress)
    else:
        text = any(row.text for row in rows)  # read in windows of the length it was trained in
        data = data if text else data.model_copy(update={"max_length": model.config.max_positions})
        result = _language_model(model, tokenizer, data, batch, progress)
    bad = {"bad": len(problems.found)} if problems.found else {}
    return {"task": task, "rows": len(rows), **bad, **result}


def _language_model(model: CausalLM, tokenizer: Any, data: DataSection, batch: int, progress: Any) -> dict[str, Any]:
    examples = prepare(data, tokenizer, "eval")
    model.config.check_tokens([[examples.largest_token]])
    losses, weights = row_losses(model, examples, batch, progress)
    loss = float(losses.sum() / weights.sum())
    return {
        **_loss(loss, weights),
        "truncated": len(examples.truncated),
        "dropped": len(examples.unanswered) + len(examples.cut_off),
        "intervals": {"loss": interval(len(losses), lambda rows: float(losses[rows].sum() / weights[rows].sum()))},
    }


def row_losses(model: CausalLM, examples: Examples, batch: int, progress: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """`(sum of token losses, supervised tokens)` of every example, in nats, float64."""
    graph, state = nnx.split(model)
    lengths = examples.lengths
    layout = Layout(batch, int(lengths.max()), packing=False, shuffle=False, seed=0)
    losses, weights = np.zeros(len(lengths)), np.zeros(len(lengths))
    plan, done = Plan(examples, layout, 1), 0
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
    found = token_log_probs(*read(model, batch, PLAIN), batch.target_ids, model.config.logit_softcap)
    return -jnp.sum(found * batch.weights, axis=1)


_losses_by_row = jax.jit(_by_row, static_argnums=0)


def _classification(
    model: CausalLM, tokenizer: Any, stop_ids: Sequence[int], rows: list[Conversation], path: str, batch: int, progress: Any
) -> dict[str, Any]:
    """Each prompt is read once; from its cache every class is scored and an answer is generated. Rows go by length, to pad little."""
    names = classes(rows, path)
    batch = -(-len(rows) // -(-len(rows) // batch))  # as many batches, the last one as full as the others
    engine = Engine(model, stop_ids, batch)
    read = sorted(((prompt_ids(tokenizer, row), row) for row in rows), key=lambda pair: len(pair[0]))
    prompts, rows = [prompt for prompt, _ in read], [row for _, row in read]
    tokeniser = Tokeniser(tokenizer, "last")
    answers = [_continuations(tokeniser, row, prompt, names) for row, prompt in zip(rows, prompts, strict=True)]
    longest = max(len(tokens) for row in answers for tokens in row)
    scores = np.zeros((len(rows), len(names)))
    texts: list[str] = []
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        filled = engine.prefill(prompts[part], longest + _EXTRA_TOKENS)
        for column in range(len(names)):
            scores[part, column] = engine.score(filled, [row[column] for row in answers[part]])
        texts += tokenizer.batch_decode(
            engine.continue_from(filled, longest + _EXTRA_TOKENS, Sampling()), skip_special_tokens=True
        )
        if progress:
            progress(min(start + batch, len(rows)), len(rows))
    truth = np.asarray([names.index(row.answer or "") for row in rows])
    greedy = np.asarray([normalised(text) == normalised(row.answer or "") for text, row in zip(texts, rows, strict=True)])
    losses = -scores[np.arange(len(rows)), truth]
    weights = np.asarray([len(row[index]) for row, index in zip(answers, truth, strict=True)], np.float64)
    metrics = classification_metrics(truth, scores.argmax(axis=1), greedy, names)
    metrics["intervals"]["loss"] = interval(len(rows), lambda chosen: float(losses[chosen].sum() / weights[chosen].sum()))
    return {**_loss(float(losses.sum() / weights.sum()), weights), **metrics}


def _continuations(tokeniser: Tokeniser, row: Conversation, prompt: list[int], answers: Sequence[str]) -> list[list[int]]:
    """For each answer the ids from the end of the prompt through the end of turn, were it the answer."""
    chats = [replace(row, messages=[*row.prompt, {"role": "assistant", "content": answer}]) for answer in answers]
    found = []
    for documents in tokeniser(chats):
        if isinstance(documents, BadRow):
            raise documents
        document = documents[-1]
        ids = document.ids[: document.spans[-1].end].tolist()
        if ids[: len(prompt)] != prompt:
            raise UserError(
                f"{row.place}: the chat template's prompt is not a prefix of the answered chat, so an answer cannot be scored."
            )
        found.append(ids[len(prompt) :])
    return found


def _loss(loss: float, weights: np.ndarray) -> dict[str, Any]:
    return {"loss": loss, "perplexity": perplexity(loss), "supervised_tokens": int(weights.sum())}
