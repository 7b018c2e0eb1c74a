"""A whole run: evaluate, train, evaluate, export, report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxtune.config.load import dump
from jaxtune.config.schema import Config
from jaxtune.core import distributed, runtime
from jaxtune.core.files import write_json
from jaxtune.data.inspect import length_histogram
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.objective import Objective
from jaxtune.report.page import write_report
from jaxtune.tracking.metrics_log import MetricsLog, NullMetricsLog, read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.run_directory import (
    ADAPTER,
    DATA_SUMMARY,
    MODEL,
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
from jaxtune.training.loop import Evaluate, fit
from jaxtune.training.methods import adopt_adapter
from jaxtune.training.setup import Setup, build_setup
from jaxtune.training.state import TrainState
from jaxtune.weights.verify import Comparison
from jaxtune.workflows.export import export_trained, output_name
from jaxtune.workflows.run_evaluation import Metrics, RunEvaluation
from jaxtune.workflows.samples import Samples


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
        """Return the rows of metrics.jsonl."""
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
    """Train as `config` says, or continue where an earlier call was stopped.

    Args:
        config: the run.
        reporter: where progress is shown.
        fresh: remove an earlier run in the same directory instead of continuing it.
        callbacks: see every step and every evaluation, the one before training included.
        objective: what to minimize instead of the objective that the configuration names, which
            still says what the data looks like.
        metrics: further metrics of the evaluations before and after training, by name: functions of
            the predictions, rows as in predictions.jsonl.

    Raises:
        UserError, RunError, Interrupted: see `api.train` and `training.loop.fit`.

    """
    runtime.start()
    with distributed.fail_together():
        check_trackers(config)
        config = adopt_adapter(config)
        day = date.fromisoformat(distributed.broadcast_from_main(lambda: _start_day(config, fresh)))
        setup = build_setup(config, reporter, day, objective)
        schedules = (("data.train", setup.schedule), ("data.eval", setup.eval_schedule))
        digests = {key: schedule.examples.digest for key, schedule in schedules if schedule}
        distributed.assert_same("configuration", dump(config))
        distributed.assert_same("training or evaluation data", str(digests))
        distributed.barrier("agreed")
        directory = RunDirectory(config, digests, day, fresh) if distributed.is_main() else None
        distributed.barrier("run directory")
        keep_copy = directory.keep_copy if directory else None
        try:
            with jax.set_mesh(setup.mesh):
                return _run(setup, reporter, callbacks, metrics, keep_copy)
        finally:
            if directory:
                directory.close()


def _start_day(config: Config, fresh: bool) -> str:
    """Return the day the run began, in ISO format."""
    if fresh:
        return str(date.today())
    recall(config)
    check_layout(Path(config.run.dir))
    return str(first_day(config.run.dir))


def _run(
    setup: Setup,
    reporter: Reporter,
    callbacks: Sequence[Callback],
    metrics: Metrics | None,
    keep_copy: Callable[[], None] | None,
) -> Run:
    config, directory = setup.config, Path(setup.config.run.dir)
    _write(write_json, directory / DATA_SUMMARY, _summarize_data(setup))
    place = checkpoint_directory(config)
    checkpoints = Checkpoints(place, config.checkpoint.keep, reporter.warn, keep_copy)
    best = Best(place, config.checkpoint.best, reporter.warn) if config.checkpoint.best else None
    is_new = checkpoints.latest is None
    state = setup.initial() if is_new else checkpoints.restore(setup.state_layout)
    setup.release()
    if not is_new:
        reporter.say(f"Going on after step {int(state.step)} of {setup.num_steps} ({directory})")
    log = (
        MetricsLog(directory, int(state.step), Trackers(config, reporter.warn))
        if distributed.is_main()
        else NullMetricsLog()
    )
    evaluation = RunEvaluation(setup, log, reporter, metrics)
    try:
        before = evaluation.before(state)
        if before and is_new:
            for callback in callbacks:
                callback.on_evaluation(0, before, state)
        samples = Samples(setup, directory, int(state.step))
        samples.before(state)
        built_in = [SayEvaluation(reporter.say), *([KeepBest(best)] if best else []), samples]
        state = _train(
            setup,
            state,
            reporter,
            log=log,
            checkpoints=checkpoints,
            evaluate=evaluation.during(),
            callbacks=[*built_in, *callbacks],
        )
        checkpoints.wait()
        last_step = int(state.step)
        if best is not None and best.step not in (None, last_step):
            reporter.say(
                f"The evaluation was best after step {best.step} ({best.metric} "
                f"{best.value:.4f}): that state is exported"
            )
            state = best.restore(setup.state_layout)
        after = evaluation.after(state, last_step)
    finally:
        log.close()
        for opened in (checkpoints, best):
            if opened is not None:
                opened.close()
    model = setup.model(state)
    samples.after(model)
    del state  # the export loads the model again, and no longer needs the optimizer's moments
    verification = _export(setup, model, reporter)
    _write(write_report, [directory], directory / REPORT)
    adapter, weights = (
        directory / name if output_name(config) == name else None for name in (ADAPTER, MODEL)
    )
    return Run(directory, adapter, weights, before, after, verification)


def _write(write: Callable[..., Any], *arguments: Any) -> None:
    """Write a file that only one process of a run writes."""
    if distributed.is_main():
        write(*arguments)


def _train(
    setup: Setup,
    state: TrainState,
    reporter: Reporter,
    *,
    log: MetricsLog,
    checkpoints: Checkpoints,
    evaluate: Evaluate | None,
    callbacks: Sequence[Callback],
) -> TrainState:
    """Train to the end, or until a callback says that it is enough."""
    config, stop_reason = setup.config, None
    if config.train.patience is not None:
        stopping = EarlyStopping(Path(config.run.dir), config.monitor, config.train.patience)
        callbacks, stop_reason = [*callbacks, stopping], stopping.reason()
    if stop_reason is None:
        source = ScheduledBatches(setup.schedule, setup.micro_batches, setup.mesh)
        with reporter.task("Training", setup.num_steps, int(state.step)) as task:
            result = fit(
                setup,
                state,
                source,
                log=log,
                checkpoints=checkpoints,
                task=task,
                evaluate=evaluate,
                callbacks=callbacks,
            )
        state, stop_reason = result.state, result.stopped_by
    if stop_reason is not None:
        reporter.say(f"{stop_reason}: training ends here")
    return state


def _export(setup: Setup, model: CausalLM, reporter: Reporter) -> Comparison:
    """Export the trained model into the run's directory, with what it was compared on."""
    directory, name = Path(setup.config.run.dir), output_name(setup.config)
    what, pronoun = ("weights", "them") if name == MODEL else ("adapter", "it")
    reporter.say(f"Exporting the {what}, reloading {pronoun} and comparing logits")
    with distributed.main_only_path(directory / name) as out:
        comparison = export_trained(setup, model, out, replace=True)
    _write(write_json, directory / VERIFICATION, comparison.as_dict())
    return comparison


def _summarize_data(setup: Setup) -> dict[str, Any]:
    schedules = {"train": setup.schedule, "eval": setup.eval_schedule}
    return {
        name: {
            **schedule.examples.summary(),
            "packing_efficiency": round(schedule.efficiency(), 4),
            "steps": len(schedule),
            "lengths": length_histogram(schedule.examples.lengths),
        }
        for name, schedule in schedules.items()
        if schedule
    }
