"""A whole run: evaluate, train, evaluate, export, report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxtune.config.keys import flatten
from jaxtune.config.schema import Config
from jaxtune.core import distributed, runtime
from jaxtune.core.errors import UserError
from jaxtune.core.files import write_json
from jaxtune.data.inspect import length_histogram
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.objective import Objective
from jaxtune.report.page import write_report
from jaxtune.tracking.metrics_log import MetricsLog, NullMetricsLog, metric_names, read_metrics
from jaxtune.tracking.ownership import ADAPTER, DATA_SUMMARY, MODEL, REPORT, VERIFICATION
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import check_layout, checkpoint_directory, first_day, record_of
from jaxtune.tracking.run_directory import RunDirectory, check_place
from jaxtune.tracking.trackers import Trackers, check_trackers
from jaxtune.training.batch_source import ScheduledBatches
from jaxtune.training.callbacks import Callback, EarlyStopping, KeepBest, SayEvaluation
from jaxtune.training.checkpoint import Best, Checkpoints
from jaxtune.training.interrupt import StopRequest
from jaxtune.training.loop import fit
from jaxtune.training.methods import adopt_adapter
from jaxtune.training.setup import Setup, build_setup
from jaxtune.training.state import TrainState
from jaxtune.weights.digest import digest_weights
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
        distributed.assert_same(
            "configuration", {**flatten(config.model_dump(mode="json")), "--fresh": fresh}
        )
        config = adopt_adapter(config)
        day = date.fromisoformat(distributed.broadcast_from_main(lambda: _start_day(config, fresh)))
        setup = build_setup(config, reporter, day, objective)
        schedules = (("data.train", setup.schedule), ("data.eval", setup.eval_schedule))
        digests = {key: schedule.examples.digest for key, schedule in schedules if schedule}
        if config.on_pairs:
            digests |= {
                f"{key} (labels)": schedule.examples.labels_digest()
                for key, schedule in schedules
                if schedule
            }
        distributed.assert_same("configuration", flatten(config.model_dump(mode="json")))
        distributed.assert_same("training or evaluation data", digests)
        distributed.barrier("agreed")
        directory = None
        if distributed.is_main():
            digests |= _digests_of_weights(setup)
            directory = RunDirectory(config, digests, day, fresh, reporter.warn)
        distributed.barrier("run directory")
        try:
            with jax.set_mesh(setup.mesh):
                return _run(setup, reporter, callbacks, metrics, directory)
        finally:
            if directory:
                directory.close()


def _digests_of_weights(setup: Setup) -> dict[str, str]:
    """Return digests of what the run begins from, by key; of a teacher only where it lies on
    disk.
    """
    adapter, teacher = setup.config.adapter.start, setup.config.distill.teacher
    paths = {"model.source": setup.source.path}
    paths |= {"adapter.init": Path(adapter)} if adapter else {}
    paths |= {"distill.teacher": Path(teacher)} if teacher else {}
    return {key: digest_weights(path) for key, path in paths.items() if path.exists()}


def _start_day(config: Config, fresh: bool) -> str:
    """Check where the run writes, before anything loads; return the day it began, in ISO format."""
    check_place(config, fresh)
    if fresh:
        return str(date.today())
    record = record_of(config)
    check_layout(record)
    return str(first_day(record))


def _run(
    setup: Setup,
    reporter: Reporter,
    callbacks: Sequence[Callback],
    metrics: Metrics | None,
    directory: RunDirectory | None,
) -> Run:
    config, path = setup.config, Path(setup.config.run.dir)
    _write(write_json, path / DATA_SUMMARY, _summarize_data(setup))
    checkpoints, best = _open_checkpoints(config, reporter, directory)
    is_new = checkpoints.latest is None
    distributed.broadcast_from_main(lambda: _check_not_lost(directory, is_new, config))
    state = setup.initial() if is_new else checkpoints.restore(setup.state_layout)
    step = int(state.step)
    log = (
        MetricsLog(path, step, Trackers(config, reporter.warn, step), reporter.warn)
        if distributed.is_main()
        else NullMetricsLog()
    )
    evaluation = RunEvaluation(setup, log, reporter, metrics)
    samples = Samples(setup, path, step)
    try:
        before = _record_start(setup, state, evaluation, samples, reporter)
        if before and is_new:
            for callback in callbacks:
                callback.on_evaluation(0, before, state)
        _repeat_callbacks(log, best, samples, state)
        built_in = [SayEvaluation(reporter.say), *([KeepBest(best)] if best else []), samples]
        state = _train(
            setup,
            state,
            reporter,
            log=log,
            checkpoints=checkpoints,
            evaluation=evaluation,
            callbacks=[*built_in, *callbacks],
        )
        checkpoints.wait()
        if directory:
            directory.note_saved()
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
    verification = _export(setup, model, reporter, directory)
    _write(write_report, [path], path / REPORT)
    adapter, weights = (
        path / name if output_name(config) == name else None for name in (ADAPTER, MODEL)
    )
    return Run(path, adapter, weights, before, after, verification)


def _open_checkpoints(
    config: Config, reporter: Reporter, directory: RunDirectory | None
) -> tuple[Checkpoints, Best | None]:
    """Open the run's checkpoints, and the one of the best state where it is kept."""
    place, keep = checkpoint_directory(config), config.checkpoint.keep
    run_id = distributed.broadcast_from_main(lambda: directory.id if directory else None)
    before = directory.before_checkpoint if directory else None
    checkpoints = Checkpoints(place, keep, reporter.warn, before, run_id=run_id)
    metric = config.checkpoint.best
    return checkpoints, Best(place, metric, reporter.warn, run_id=run_id) if metric else None


def _repeat_callbacks(
    log: MetricsLog, best: Best | None, samples: Samples, state: TrainState
) -> None:
    """Do once more what follows an evaluation of the state that a run goes on from: a run that was
    killed may have logged the evaluation and not come to that.
    """
    step = int(state.step)
    row = distributed.broadcast_from_main(lambda: log.evaluation_at(step))
    if row is None:
        return
    if best is not None and row.get(best.metric) is not None:
        best.offer(state, {name: row[name] for name in metric_names(row)})
    if not samples.has_answers_of(step):
        samples.on_evaluation(step, row, state)


def _check_not_lost(directory: RunDirectory | None, is_new: bool, config: Config) -> None:
    """Check that a run which has saved its state still has it.

    Raises:
        UserError: no checkpoint is there.

    """
    if directory is not None and is_new and directory.has_saved:
        raise UserError(
            f"{directory.path} holds a run whose checkpoints are not in "
            f"{checkpoint_directory(config)}. Set checkpoint.dir to where they are, or start over "
            "with --fresh."
        )


def _record_start(
    setup: Setup,
    state: TrainState,
    evaluation: RunEvaluation,
    samples: Samples,
    reporter: Reporter,
) -> dict[str, Any] | None:
    """Record what the model computes and answers before training, also where a run that goes on
    has lost that; return the metrics.
    """
    start, step = state, int(state.step)
    if step > 0:
        reporter.say(f"Going on after step {step} of {setup.num_steps} ({setup.config.run.dir})")
        if evaluation.lacks_before() or not samples.is_continued:
            reporter.warn(
                "WARNING: what was measured before training is lost, or a part of it; it is "
                "measured again."
            )
            start = setup.initial()
    setup.release()
    before = evaluation.before(start)
    samples.before(start)
    return before


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
    evaluation: RunEvaluation,
    callbacks: Sequence[Callback],
) -> TrainState:
    """Train to the end, or until a callback says that it is enough."""
    config, stop_reason = setup.config, None
    if config.train.patience is not None:
        stopping = EarlyStopping(Path(config.run.dir), config.monitor, config.train.patience)
        callbacks, stop_reason = [*callbacks, stopping], stopping.reason()
    if stop_reason is None:
        source = ScheduledBatches(setup.schedule, setup.micro_batches, setup.mesh)
        stop = StopRequest()
        with reporter.task("Training", setup.num_steps, int(state.step)) as task:
            result = fit(
                setup,
                state,
                source,
                log=log,
                checkpoints=checkpoints,
                task=task,
                evaluate=evaluation.during(stop.check),
                callbacks=callbacks,
                stop=stop,
            )
        state, stop_reason = result.state, result.stopped_by
    if stop_reason is not None:
        reporter.say(f"{stop_reason}: training ends here")
    return state


def _export(
    setup: Setup, model: CausalLM, reporter: Reporter, directory: RunDirectory | None
) -> Comparison:
    """Export the trained model into the run's directory, with what it was compared on."""
    path, name = Path(setup.config.run.dir), output_name(setup.config)
    what, pronoun = ("weights", "them") if name == MODEL else ("adapter", "it")
    reporter.say(f"Exporting the {what}, reloading {pronoun} and comparing logits")
    replace = directory.replacement(name) if directory else None
    with distributed.main_only_path(path / name) as out:
        comparison = export_trained(setup, model, out, replace=replace)
    _write(write_json, path / VERIFICATION, comparison.as_dict())
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
