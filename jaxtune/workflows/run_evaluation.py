"""The evaluations of a run: before and after training, where an earlier call has not made them, and
during it.
"""

import math
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
from jaxtune.tracking.ownership import PREDICTIONS
from jaxtune.tracking.progress import Reporter
from jaxtune.training.evaluator import Evaluator
from jaxtune.training.loop import Evaluate
from jaxtune.training.setup import Setup
from jaxtune.training.state import TrainState

Metrics = Mapping[str, Callable[[list[dict[str, Any]]], float]]
"""Functions of an evaluation's predictions, by the metric's name."""
_WITHOUT_PREDICTIONS = ("lm", "preference")


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
            UserError: they lack the metric that the run is judged by, or the loss is not finite.

        """
        row = self._row(state, 0, BEFORE)
        config, monitor = self._setup.config, self._setup.config.monitor
        if row is not None and not math.isfinite(row.get("loss") or math.nan):
            start = f" and adapter.init ({config.adapter.start})" if config.adapter.start else ""
            raise UserError(
                f"The loss before training is not finite, so the run does not start: look at the "
                f"weights of model.source ({config.model.source}){start}, or compute them in "
                "float32 (model.compute_dtype=float32)."
            )
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

    def lacks_before(self) -> bool:
        """Return whether the metrics before training are not logged, or were lost."""
        return self._setup.eval_schedule is not None and distributed.broadcast_from_main(
            lambda: self._logged(0, 0, BEFORE) is None
        )

    def during(self, check: Callable[[], None]) -> Evaluate | None:
        """Return what measures a state during training: the objective's loss, and the whole
        evaluation where the run is judged by another metric; None without evaluation data.

        Args:
            check: called between batches; what it raises ends the evaluation.

        """
        schedule, monitor = self._setup.eval_schedule, self._setup.config.monitor
        if schedule is None:
            return None
        measure_loss = Evaluator(self._setup, schedule, check)

        def measure(state: TrainState) -> dict[str, float]:
            metrics = measure_loss(state)
            if monitor in metrics:
                return metrics
            evaluation = self._evaluate(state, lambda done, total: check()).as_dict()
            return {name: evaluation[name] for name in metric_names(evaluation)}

        return measure

    def _row(self, state: TrainState, step: int, phase: Phase) -> dict[str, Any] | None:
        """Return the row of metrics.jsonl: the one that an earlier call logged of the same state,
        or a new one.
        """
        schedule = self._setup.eval_schedule
        state_step = int(state.step) if phase == AFTER else step
        if schedule is None:
            return None
        logged = distributed.broadcast_from_main(lambda: self._logged(step, state_step, phase))
        if logged and not (phase == AFTER and self._lacks_predictions(logged)):
            return logged
        metrics = self._measure(state, phase, schedule)
        if logged:
            return logged
        epoch = round(self._setup.schedule.epoch(step - 1), 6) if step else 0.0
        row = {"split": "eval", "step": step, "epoch": epoch, "phase": phase, **metrics}
        if state_step != step:
            row["state_step"] = state_step
        self._log.supersede(lambda earlier: phase_of(earlier) == phase)
        self._log.write(row)
        return row

    def _logged(self, step: int, state_step: int, phase: Phase) -> dict[str, Any] | None:
        for row in read_metrics(self._directory):
            if phase_of(row) == phase and row["step"] == step:
                return row if row.get("state_step", step) == state_step else None
        return None

    def _lacks_predictions(self, row: dict[str, Any]) -> bool:
        """Return whether the predictions that came with a row were lost."""
        return row.get("task") not in _WITHOUT_PREDICTIONS and distributed.broadcast_from_main(
            lambda: not (self._directory / PREDICTIONS).exists()
        )

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
