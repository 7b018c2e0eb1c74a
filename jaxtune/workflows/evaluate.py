"""Evaluate a model, and compare it with its base or with another model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError
from jaxtune.evaluation.evaluate import EvalOptions, Evaluation, evaluate
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import is_run, read_config
from jaxtune.weights.loaded import LoadedModel
from jaxtune.workflows.load import Pair, open_model, open_with_base

_OF_THE_ROW = ("place", "prompt", "wanted")  # what two predictions of one row share


@dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate_model`.

    Attributes:
        metrics: as `api.evaluate` returns them.
        predictions: one a row, as `--predictions` writes them; the other model's under `base`.

    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate_model(
    model: str | Pair,
    data: str,
    adapter: str | None = None,
    *,
    options: EvalOptions | None = None,
    base: bool = False,
    against: str | None = None,
    reporter: Reporter | None = None,
) -> EvaluationResult:
    """Evaluate a model on a file of answered rows.

    Args:
        model: see `load.open_model`. The rows are read as the configuration of a run says.
        data: a file, a directory or a data set of the hub.
        adapter: a PEFT adapter directory.
        options: the task and how it is computed.
        base: also evaluate what the model was before training, and compare row by row.
        against: the same with another model.
        reporter: where progress is shown.

    Raises:
        UserError: a bad file, model or task, or a model without a tokenizer.

    """
    options, reporter = options or EvalOptions(), reporter or Reporter(quiet=True)
    if options.batch < 1:
        raise UserError(f"batch_size = {options.batch}: must be at least 1.")
    section = _data_section(model).model_copy(
        update={"train": None, "split": None, "eval": str(data)}
    )
    evaluations: list[Evaluation] = []
    for side in _sides(model, adapter, base, against):
        title = "Evaluating what it is compared with" if evaluations else "Evaluating"
        if evaluations:
            options = replace(options, task=evaluations[0].task)
        with reporter.task(title, 1) as bar:
            evaluations.append(
                evaluate(
                    side.model,
                    side.require_tokenizer(),
                    side.stop_ids,
                    section,
                    replace(options, progress=bar.update_of),
                )
            )
        del side  # frees it before the next is loaded
    return _compared(*evaluations)


def _data_section(model: str | Pair) -> DataSection:
    if isinstance(model, str | Path) and is_run(model):
        return read_config(Path(model)).data
    return DataSection()


def _compared(evaluation: Evaluation, other: Evaluation | None = None) -> EvaluationResult:
    metrics, predictions = evaluation.as_dict(), evaluation.predictions
    if other is not None:
        metrics |= {"base": other.as_dict(), "comparison": evaluation.compare(other)}
        for row, other_row in zip(predictions, other.predictions, strict=True):
            row["base"] = {
                name: value for name, value in other_row.items() if name not in _OF_THE_ROW
            }
    return EvaluationResult(metrics, predictions)


def run_harness(
    model: str | Pair,
    tasks: Sequence[str],
    adapter: str | None = None,
    *,
    base: bool = False,
    against: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 32,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: see `load.open_model`.
        tasks: names of tasks, groups or tags.
        adapter: a PEFT adapter directory.
        base: also run them on what the model was before training.
        against: the same with another model.
        include_path: a directory with more tasks.
        limit: only the first rows of each.
        num_fewshot: examples before each question; the task's own number by default.
        chat: whether questions go through the chat template.
        batch_size: requests computed together.
        reporter: where progress is shown.

    Returns:
        The harness's results under `model` and, with `base` or `against`, under `base`.

    Raises:
        UserError: the harness is not installed, no such task, or a model without a tokenizer.

    """
    try:
        from jaxtune.evaluation.harness import HarnessModel, run_tasks
    except ModuleNotFoundError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error.name}): pip install "
            "'jaxtune[harness]'."
        ) from None
    results: dict[str, Any] = {}
    for side in _sides(model, adapter, base, against):
        results["base" if results else "model"] = run_tasks(
            HarnessModel(side.model, side.require_tokenizer(), side.stop_ids, batch_size, reporter),
            tasks,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
        )
        del side  # frees it before the next is loaded
    return results


def _sides(
    model: str | Pair, adapter: str | None, base: bool, against: str | None
) -> Iterator[LoadedModel]:
    """Yield the model, and then what it is compared with; each is loaded when it is asked for."""
    if base and against:
        raise UserError("--base and --against both name what to compare with. Keep one of them.")
    if base:
        tuned, open_base = open_with_base(model, adapter)
        yield tuned
        del tuned
        yield open_base()
        return
    yield open_model(model, adapter)
    if against:
        yield open_model(against)
