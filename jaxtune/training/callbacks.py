"""What is called back while a run trains; evaluations are acted upon here, the loop makes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.core import distributed
from jaxtune.tracking.metrics_log import evals_since_best, read_metrics
from jaxtune.training.checkpoint import Best
from jaxtune.training.state import TrainState


class Callback:
    """A callback of a run; override what is wanted.

    Whatever a callback raises ends the run. A text that it returns ends training after the step at
    hand, as if it were the last: the state is saved, evaluated and exported, and the text is the
    reason that is given. Where a run has several processes, each calls its own callbacks, and all
    must return the same: go by what is equal in all, such as the loss, not by times.
    """

    def on_step(self, row: dict[str, Any]) -> str | None:
        """See a step's row of metrics.jsonl, once the step after it is under way.

        Returns:
            Why training shall end; None: it goes on.

        """

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> str | None:
        """See an evaluation: the one before training (step 0) and those during it.

        Args:
            step: optimizer steps done.
            metrics: what was measured, by name.
            state: the state that was evaluated; the next step is given its buffers, so keep none of
                it.

        Returns:
            Why training shall end; None: it goes on.

        """

    def on_end(self, step: int) -> None:
        """See that the loop has ended after so many steps, for whatever reason, errors included."""


class SayEvaluation(Callback):
    """Tells of each evaluation in a line.

    Args:
        say: takes the line.

    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> None:
        """Say what was measured."""
        measured = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._say(f"step {step}: evaluation {measured}")


class KeepBest(Callback):
    """Keeps the state with the best evaluation.

    Args:
        best: its checkpoint.

    """

    def __init__(self, best: Best) -> None:
        self._best = best

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> None:
        """Keep this state if it is the best."""
        self._best.offer(state, metrics)


class EarlyStopping(Callback):
    """Ends training when the last evaluations brought nothing better.

    What it goes by is read from the run's log, so that a run that is continued stops where it would
    have.

    Args:
        directory: the run directory.
        monitor: the metric.
        patience: evaluations without a better one that end training.

    """

    def __init__(self, directory: Path, monitor: str, patience: int) -> None:
        self._directory, self._monitor, self._patience = directory, monitor, patience

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> str | None:
        """Return why training shall end, if it shall."""
        return self.reason()

    def reason(self) -> str | None:
        """Return why training shall end by what the log has so far, if it shall."""
        since = distributed.broadcast_from_main(
            lambda: evals_since_best(read_metrics(self._directory), self._monitor)
        )
        if since < self._patience:
            return None
        return f"No better {self._monitor} in {since} evaluations (train.patience)"
