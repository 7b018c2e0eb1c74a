"""A whole run: evaluate, train, evaluate, export, report."""

from collections.abc import Callable, Mapping, Sequence
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
from jaxtune.data.inspect import length_histogram
from jaxtune.evaluation.evaluate import EvalOptions, evaluate
from jaxtune.objectives.objective import Objective
from jaxtune.report.page import write_report
from jaxtune.tracking.metrics_log import (
    AFTER,
    BEFORE,
    MetricsLog,
    NullMetricsLog,
    Phase,
    metric_names,
    phase_of,
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
    check_layout,
    checkpoint_directory,
    first_day,
    recall,
)
from jaxtune.tracking.trackers import Trackers, check_trackers
from jaxtune.training.batch_source import ScheduledBatches
from jaxtune.training.callbacks import Callback, EarlyStopping, KeepBest, SayEvaluation
from jaxtune.training.checkpoint import Best, Checkpoints
from jaxtune.training.evaluator import Evaluator
from jaxtune.training.loop import Evaluate, fit
from jaxtune.training.methods import adopt_adapter
from jaxtune.training.setup import Setup, build_setup
from jaxtune.training.state import TrainState
from jaxtune.weights.verify import Comparison
from jaxtune.workflows.export import export_trained, output
from jaxtune.workflows.samples import Samples

Metrics = Mapping[str, Callable[[list[dict[str, Any]]], float]]


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
    config: Config,
    reporter: Reporter,
    *,
    fresh: bool = False,
    callbacks: Sequence[Callback] = (),
    objective: Objective | None = None,
    metrics: Metrics | None = None,
) -> Run:
    """Train as `config` says, or go on where an earlier call was stopped.

    Args:
        config: the run.
        reporter: where progress is shown.
        fresh: remove an earlier run in the same directory instead of going on with it.
        callbacks: see every step and every evaluation, the one before training included.
        objective: what is minimized instead of the objective that the configuration names; the data
            is still what that one takes.
        metrics: further metrics of the evaluations before and after training by name: functions of
            what the model said, in the rows of predictions.jsonl.

    Raises:
        UserError, RunError, Interrupted: see `api.train` and `training.loop.fit`.

    """
    runtime.start()
    with distributed.fail_together():
        check_trackers(config)
        config = adopt_adapter(config)
        day = date.fromisoformat(distributed.broadcast_from_main(lambda: _begun(config, fresh)))
        parts = build_setup(config, reporter, day, objective)
        plans = (("data.train", parts.schedule), ("data.eval", parts.eval_schedule))
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
                    callbacks,
                    metrics or {},
                )
        finally:
            if directory:
                directory.close()


def _begun(config: Config, fresh: bool) -> str:
    """The day the run began."""
    if fresh:
        return str(date.today())
    recall(config)
    check_layout(Path(config.run.dir))
    return str(first_day(config.run.dir))


def _run(
    parts: Setup,
    directory: Path,
    reporter: Reporter,
    keep_copy: Callable[[], None] | None,
    callbacks: Sequence[Callback],
    metrics: Metrics,
) -> Run:
    config = parts.config
    _write(write_json, directory / DATA_SUMMARY, _data_summary(parts))
    where = checkpoint_directory(config)
    checkpoints = Checkpoints(where, config.checkpoint.keep, reporter.warn, keep_copy)
    best = Best(where, config.checkpoint.best, reporter.warn) if config.checkpoint.best else None
    begins = checkpoints.latest is None
    state = parts.initial() if begins else checkpoints.restore(parts.state_layout)
    parts.release()
    if not begins:
        reporter.say(f"Going on after step {int(state.step)} of {parts.num_steps} ({directory})")
    log = (
        MetricsLog(directory, int(state.step), Trackers(config, reporter.warn))
        if distributed.is_main()
        else NullMetricsLog()
    )
    try:
        before = _measured(parts, state, log, reporter, step=0, metrics=metrics)
        _check_figure(config, before)
        if before and begins:
            for callback in callbacks:
                callback.on_evaluation(0, before, state)
        samples = Samples(parts, directory, int(state.step))
        samples.before(state)
        built_in = [SayEvaluation(reporter.say), *([KeepBest(best)] if best else []), samples]
        state = _trained(parts, state, log, checkpoints, reporter, [*built_in, *callbacks])
        checkpoints.wait()
        ended = int(state.step)
        if best is not None and best.step not in (None, ended):
            reporter.say(
                f"The evaluation was best after step {best.step} ({best.metric} "
                f"{best.value:.4f}): that state is taken"
            )
            state = best.restore(parts.state_layout)
        after = _measured(parts, state, log, reporter, step=ended, metrics=metrics)
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


def _trained(
    parts: Setup,
    state: TrainState,
    log: MetricsLog,
    checkpoints: Checkpoints,
    reporter: Reporter,
    callbacks: Sequence[Callback],
) -> TrainState:
    """Train to the end, or until a callback says that it is enough."""
    train, stop_reason = parts.config.train, None
    if train.patience is not None:
        stopping = EarlyStopping(Path(parts.config.run.dir), parts.config.monitor, train.patience)
        callbacks, stop_reason = [*callbacks, stopping], stopping.reason()
    if stop_reason is None:
        source = ScheduledBatches(parts.schedule, parts.micro_batches, parts.mesh)
        with reporter.task("Training", parts.num_steps, int(state.step)) as task:
            result = fit(
                parts,
                state,
                source,
                log=log,
                checkpoints=checkpoints,
                task=task,
                evaluate=_evaluate_during(parts),
                callbacks=callbacks,
            )
        state, stop_reason = result.state, result.stopped_by
    if stop_reason is not None:
        reporter.say(f"{stop_reason}: training ends here")
    return state


def _measured(
    parts: Setup,
    state: TrainState,
    log: MetricsLog,
    reporter: Reporter,
    *,
    step: int,
    metrics: Metrics,
) -> dict[str, Any] | None:
    """Evaluate before (step 0) or after training: from the log where an earlier call has it, else
    measured and logged.
    """
    directory, phase = Path(parts.config.run.dir), AFTER if step else BEFORE
    if parts.eval_schedule is None:
        return None
    logged = distributed.broadcast_from_main(lambda: _logged(directory, step, phase))
    if logged:
        return logged
    with reporter.task(f"Evaluating {phase}", 1) as bar:
        if parts.config.on_pairs:
            result = {
                "task": "preference",
                "rows": parts.eval_schedule.examples.rows,
                **Evaluator(parts, parts.eval_schedule)(state),
            }
        else:
            options = EvalOptions(parts.config.train.eval_task, progress=bar.update_of)
            model, stop_ids = parts.model(state), parts.source.stop_ids()
            evaluation = evaluate(model, parts.tokenizer, stop_ids, parts.config.data, options)
            result = evaluation.figures()
            result |= {name: float(of(evaluation.predictions)) for name, of in metrics.items()}
            if step and evaluation.predictions:
                _write(write_jsonl, directory / PREDICTIONS, evaluation.predictions)
    epoch = _epoch(parts, step)
    row = {"split": "eval", "step": step, "epoch": epoch, "phase": phase, **result}
    log.write(row)
    return row


def _logged(directory: Path, step: int, phase: Phase) -> dict[str, Any] | None:
    rows = (
        row
        for row in read_metrics(directory)
        if phase_of(row) == phase and row["step"] == step
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


def _evaluate_during(parts: Setup) -> Evaluate | None:
    """Return what measures a state during training: the objective's loss, and the whole evaluation
    where the run goes by another metric.
    """
    if parts.eval_schedule is None:
        return None
    config, measure_loss = parts.config, Evaluator(parts, parts.eval_schedule)

    def measure(state: TrainState) -> dict[str, float]:
        metrics = measure_loss(state)
        if config.monitor in metrics:
            return metrics
        options, model = EvalOptions(config.train.eval_task), parts.model(state)
        evaluation = evaluate(
            model, parts.tokenizer, parts.source.stop_ids(), config.data, options
        ).figures()
        return {name: evaluation[name] for name in metric_names(evaluation)}

    return measure


def _epoch(parts: Setup, step: int) -> float:
    return round(parts.schedule.epoch(step - 1), 6) if step else 0.0


def _data_summary(parts: Setup) -> dict[str, Any]:
    plans = {"train": parts.schedule, "eval": parts.eval_schedule}
    return {
        name: {
            **plan.examples.summary(),
            "packing_efficiency": round(plan.efficiency(), 4),
            "steps": len(plan),
            "lengths": length_histogram(plan.examples.lengths),
        }
        for name, plan in plans.items()
        if plan
    }
