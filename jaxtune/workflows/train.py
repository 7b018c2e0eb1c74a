"""A whole run: evaluate, train, evaluate, export, report."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxtune.config.load import dump
from jaxtune.config.schema import Config
from jaxtune.core import distributed, runtime
from jaxtune.core.errors import UserError
from jaxtune.core.files import write_json, write_jsonl
from jaxtune.data.inspect import histogram
from jaxtune.evaluation.evaluate import EvalOptions, evaluate
from jaxtune.report.page import write_report
from jaxtune.tracking.metrics_log import (
    MetricsLog,
    NullMetricsLog,
    evals_since_best,
    metric_names,
    read_metrics,
)
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.run_directory import (
    ADAPTER,
    DATA_SUMMARY,
    MODEL,
    PREDICTIONS,
    REPORT,
    VERIFICATION,
    RunDirectory,
    checkpoint_directory,
    first_day,
    recall,
)
from jaxtune.tracking.trackers import Trackers, check_trackers
from jaxtune.training.checkpoint import Best, Checkpoints
from jaxtune.training.loop import Evaluator, fit
from jaxtune.training.methods import adopt_adapter
from jaxtune.training.setup import Setup, setup
from jaxtune.training.state import TrainState
from jaxtune.weights.verify import Comparison
from jaxtune.workflows.export import export_trained, output
from jaxtune.workflows.samples import Samples

Watch = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        dir: its directory.
        adapter: the PEFT adapter; None where the weights themselves trained.
        model: the trained model in Hugging Face's format; None where an adapter trained.
        before, after: metrics on the evaluation data; None where there is none.
        verification: what the export was compared on.

    """

    dir: Path
    adapter: Path | None
    model: Path | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    verification: Comparison

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.dir)


def run(
    config: Config, reporter: Reporter, *, fresh: bool = False, watch: Watch | None = None
) -> Run:
    """Train as `config` says, or go on where an earlier call was stopped.

    Args:
        config: the run.
        reporter: where progress is shown.
        fresh: remove an earlier run in the same directory instead of going on with it.
        watch: called with the step and the figures of the evaluation before training and of every
            one on the way; what it raises ends the run.

    Raises:
        UserError, RunError, Interrupted: see `api.train` and `training.loop.fit`.

    """
    runtime.start()
    with distributed.fail_together():
        check_trackers(config)
        config = adopt_adapter(config)
        day = date.fromisoformat(distributed.broadcast_from_main(lambda: _begun(config, fresh)))
        parts = setup(config, reporter, day)
        plans = (("data.train", parts.plan), ("data.eval", parts.eval_plan))
        digests = {key: plan.examples.digest for key, plan in plans if plan}
        distributed.assert_same("configuration", dump(config))
        distributed.assert_same("training or evaluation data", str(digests))
        distributed.barrier("agreed")
        directory = RunDirectory(config, digests, day, fresh) if distributed.is_main() else None
        distributed.barrier("run directory")
        try:
            with jax.set_mesh(parts.mesh):
                return _run(
                    parts,
                    Path(config.run.dir),
                    reporter,
                    directory.keep_copy if directory else None,
                    watch,
                )
        finally:
            if directory:
                directory.close()


def _begun(config: Config, fresh: bool) -> str:
    """The day the run began."""
    if fresh:
        return str(date.today())
    recall(config)
    return str(first_day(config.run.dir))


def _run(
    parts: Setup,
    directory: Path,
    reporter: Reporter,
    keep_copy: Callable[[], None] | None,
    watch: Watch | None,
) -> Run:
    config, total = parts.config, len(parts.plan)
    _write(write_json, directory / DATA_SUMMARY, _data_summary(parts))
    checkpoints = Checkpoints(
        checkpoint_directory(config), config.checkpoint.keep, reporter.say, keep_copy
    )
    best = (
        Best(checkpoint_directory(config), config.checkpoint.best, reporter.say)
        if config.checkpoint.best
        else None
    )
    begins = checkpoints.latest is None
    state = parts.initial() if begins else checkpoints.restore(parts.layout)
    parts.release()
    if not begins:
        reporter.say(f"Going on after step {int(state.step)} of {total} ({directory})")
    log = (
        MetricsLog(directory, int(state.step), Trackers(config, reporter.say))
        if distributed.is_main()
        else NullMetricsLog()
    )
    try:
        before = _measured(parts, state, log, directory, 0, reporter)
        _check_figure(config, before)
        if before and watch:
            watch(0, before)
        samples = Samples(parts, directory, int(state.step))
        samples.before(state)
        on_the_way = EvalCallback(parts, log, best, samples, directory, reporter, watch)
        if not on_the_way.enough():
            with reporter.task("Training", total, int(state.step)) as task:
                state = fit(parts, state, log, checkpoints, task, on_the_way)
        checkpoints.wait()
        ended = int(state.step)
        if best is not None and best.step not in (None, ended):
            reporter.say(
                f"The evaluation was best after step {best.step} ({best.metric} "
                f"{best.value:.4f}): that state is taken"
            )
            state = best.restore(parts.layout)
        after = _measured(parts, state, log, directory, ended, reporter)
    finally:
        log.close()
        for opened in (checkpoints, best):
            if opened is not None:
                opened.close()
    model = parts.model(state)
    samples.after(model)
    del (
        state
    )  # the export loads the model again, and the optimizer's moments are not needed any more
    kind = output(config)
    reporter.say(
        f"Exporting the {'weights' if kind == MODEL else 'adapter'}, reloading "
        f"{'them' if kind == MODEL else 'it'} and comparing logits"
    )
    with distributed.main_only_path(directory / kind) as out:
        verification = export_trained(parts, model, out, replace=True)
    _write(write_json, directory / VERIFICATION, verification.as_dict())
    _write(write_report, [directory], directory / REPORT)
    adapter, weights = (directory / name if kind == name else None for name in (ADAPTER, MODEL))
    return Run(directory, adapter, weights, before, after, verification)


def _write(write: Callable[..., Any], *arguments: Any) -> None:
    """Write what only one process of a run writes."""
    if distributed.is_main():
        write(*arguments)


def _measured(
    parts: Setup, state: TrainState, log: MetricsLog, directory: Path, step: int, reporter: Reporter
) -> dict[str, Any] | None:
    """The evaluation before (step 0) or after training: from the log where an earlier call has
    it, else made and logged.
    """
    if parts.eval_plan is None:
        return None
    found = distributed.broadcast_from_main(lambda: _logged(directory, step))
    if found:
        return found
    with reporter.task("Evaluating before" if step == 0 else "Evaluating after", 1) as bar:
        model = parts.model(state)
        if parts.config.on_pairs:
            result = {
                "task": "preference",
                "rows": parts.eval_plan.examples.rows,
                **Evaluator(parts, parts.eval_plan)(state),
            }
        else:
            asked = EvalOptions(parts.config.train.eval_task, progress=bar.update_of)
            found = evaluate(
                model, parts.tokenizer, parts.source.stop_ids(), parts.config.data, asked
            )
            result = found.figures()
            if step and found.predictions:
                _write(write_jsonl, directory / PREDICTIONS, found.predictions)
    row = {"split": "eval", "step": step, "epoch": _epoch(parts, step), **result}
    log.write(row)
    return row


def _logged(directory: Path, step: int) -> dict[str, Any] | None:
    rows = (
        row
        for row in read_metrics(directory)
        if row["split"] == "eval" and row["step"] == step and "task" in row
    )
    return next(rows, None)


def _check_figure(config: Config, before: dict[str, Any] | None) -> None:
    """Whether the evaluation has what the run shall be judged by, before it is trained."""
    if before is not None and config.monitor not in before:
        raise UserError(
            f"checkpoint.best = {config.monitor}: the evaluation ({before['task']}) has "
            f"{', '.join(metric_names(before))}. "
            "Take one of these, or set train.eval_task."
        )


class EvalCallback:
    """The evaluation every `train.eval_every` steps: logged, offered to the best state, with
    answers to look at.

    Args:
        parts: the run.
        log: gets a row for each.
        best: keeps the best state, where that is wanted.
        samples: the answers.
        directory: the run directory.
        reporter: told of each.
        watch: see `run`.

    """

    def __init__(
        self,
        parts: Setup,
        log: MetricsLog,
        best: Best | None,
        samples: Samples,
        directory: Path,
        reporter: Reporter,
        watch: Watch | None,
    ) -> None:
        self._parts, self._log, self._best, self._samples = parts, log, best, samples
        self._directory, self._reporter, self._watch = directory, reporter, watch
        self._loss = Evaluator(parts, parts.eval_plan) if parts.eval_plan else None

    def __call__(self, state: TrainState, step: int) -> bool:
        """Whether training shall end after it."""
        if self._loss is None:
            return False
        config, figures = self._parts.config, self._loss(state)
        if config.monitor not in figures:
            asked = EvalOptions(config.train.eval_task)
            model, stops = self._parts.model(state), self._parts.source.stop_ids()
            found = evaluate(model, self._parts.tokenizer, stops, config.data, asked).figures()
            figures = {name: found[name] for name in metric_names(found)}
        self._log.write(
            {"split": "eval", "step": step, "epoch": _epoch(self._parts, step), **figures}
        )
        self._reporter.say(
            f"step {step}: evaluation "
            + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        )
        if self._best is not None:
            self._best.offer(state, figures)
        if config.train.samples and step < len(self._parts.plan):
            self._samples.during(state, step)
        if self._watch:
            self._watch(step, figures)
        return self.enough()

    def enough(self) -> bool:
        """Whether the last evaluations were no better for longer than the run's patience."""
        config = self._parts.config
        if config.train.patience is None:
            return False
        since = distributed.broadcast_from_main(
            lambda: evals_since_best(read_metrics(self._directory), config.monitor)
        )
        if since >= config.train.patience:
            self._reporter.say(
                f"No better {config.monitor} in {since} evaluations (train.patience): training "
                "ends here"
            )
        return since >= config.train.patience


def _epoch(parts: Setup, step: int) -> float:
    return round(parts.plan.epoch(step - 1), 6) if step else 0.0


def _data_summary(parts: Setup) -> dict[str, Any]:
    plans = {"train": parts.plan, "eval": parts.eval_plan}
    return {
        name: {
            **plan.examples.summary(),
            "packing_efficiency": round(plan.efficiency(), 4),
            "steps": len(plan),
            "lengths": histogram(plan.examples.lengths),
        }
        for name, plan in plans.items()
        if plan
    }
