"""The evaluations of a run: before and after training, where an earlier call has not made them, and
during it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.core import distributed
from jaxtune.core.errors import UserError
from jaxtune.core.files import write_jsonl
from jaxtune.data.loader import BatchSchedule
from jaxtune.evaluation.evaluate import EvalOptions, EvalProgress, Evaluation, evaluate
from jaxtune.tracking.metrics_log import (
    AFTER,
    BEFORE,
    MetricsLog,
    Phase,
    metric_names,
    phase_of,
    read_metrics,
)
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.run_directory import PREDICTIONS
from jaxtune.training.evaluator import Evaluator
from jaxtune.training.loop import Evaluate
from jaxtune.training.setup import Setup
from jaxtune.training.state import TrainState

Metrics = Mapping[str, Callable[[list[dict[str, Any]]], float]]
"""Functions of an evaluation's predictions, by the metric's name."""


class RunEvaluation:
    """The evaluation of a run's states.

    Args:
        setup: the run.
        log: gets a row for each evaluation.
        reporter: where progress is shown.
        metrics: further metrics of the evaluations before and after training.

    """

    def __init__(
        self, setup: Setup, log: MetricsLog, reporter: Reporter, metrics: Metrics | None = None
    ) -> None:
        self._setup, self._log, self._reporter = setup, log, reporter
        self._metrics = metrics or {}
        self._directory = Path(setup.config.run.dir)

    def before(self, state: TrainState) -> dict[str, Any] | None:
        """Return the metrics before training; None without evaluation data.

        Raises:
            UserError: they lack the metric that the run is judged by.

        """
        row = self._row(state, 0, BEFORE)
        monitor = self._setup.config.monitor
        if row is not None and monitor not in row:
            raise UserError(
                f"checkpoint.best = {monitor}: the evaluation ({row['task']}) has "
                f"{', '.join(metric_names(row))}. Take one of these, or set train.eval_task."
            )
        return row

    def after(self, state: TrainState, step: int) -> dict[str, Any] | None:
        """Return the metrics after training; None without evaluation data.

        Args:
            state: the state to export.
            step: the step at which training ended, also where an earlier state is exported.

        """
        return self._row(state, step, AFTER)

    def during(self) -> Evaluate | None:
        """Return what measures a state during training: the objective's loss, and the whole
        evaluation where the run is judged by another metric; None without evaluation data.
        """
        schedule, monitor = self._setup.eval_schedule, self._setup.config.monitor
        if schedule is None:
            return None
        measure_loss = Evaluator(self._setup, schedule)

        def measure(state: TrainState) -> dict[str, float]:
            metrics = measure_loss(state)
            if monitor in metrics:
                return metrics
            evaluation = self._evaluate(state).as_dict()
            return {name: evaluation[name] for name in metric_names(evaluation)}

        return measure

    def _row(self, state: TrainState, step: int, phase: Phase) -> dict[str, Any] | None:
        """Return the row of metrics.jsonl: the one that an earlier call logged, or a new one."""
        schedule = self._setup.eval_schedule
        if schedule is None:
            return None
        logged = distributed.broadcast_from_main(lambda: self._logged(step, phase))
        if logged:
            return logged
        metrics = self._measure(state, phase, schedule)
        epoch = round(self._setup.schedule.epoch(step - 1), 6) if step else 0.0
        row = {"split": "eval", "step": step, "epoch": epoch, "phase": phase, **metrics}
        self._log.write(row)
        return row

    def _logged(self, step: int, phase: Phase) -> dict[str, Any] | None:
        rows = read_metrics(self._directory)
        return next((row for row in rows if phase_of(row) == phase and row["step"] == step), None)

    def _measure(self, state: TrainState, phase: Phase, schedule: BatchSchedule) -> dict[str, Any]:
        with self._reporter.task(f"Evaluating {phase}", 1) as bar:
            if self._setup.config.on_pairs:
                losses = Evaluator(self._setup, schedule)(state)
                return {"task": "preference", "rows": schedule.examples.rows, **losses}
            evaluation = self._evaluate(state, bar.update_of)
            predictions = evaluation.predictions
            further = {name: float(metric(predictions)) for name, metric in self._metrics.items()}
            if phase == AFTER and predictions and distributed.is_main():
                write_jsonl(self._directory / PREDICTIONS, predictions)
        return evaluation.as_dict() | further

    def _evaluate(self, state: TrainState, progress: EvalProgress | None = None) -> Evaluation:
        setup = self._setup
        return evaluate(
            setup.model(state),
            setup.tokenizer,
            setup.stop_ids,
            setup.config.data,
            EvalOptions(setup.config.train.eval_task, progress=progress),
        )
