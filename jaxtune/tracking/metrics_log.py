"""The rows of a run: `metrics.jsonl`, in which each step stands once."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jaxtune.config.schema import lower_is_better
from jaxtune.core.files import write_text
from jaxtune.tracking.trackers import Trackers

FILE, SUPERSEDED = "metrics.jsonl", "metrics.superseded.jsonl"
"""The rows, and those that do not count any more: of steps that were done again, damaged ones."""
Phase = Literal["before", "during", "after"]
BEFORE: Phase = "before"
DURING: Phase = "during"
AFTER: Phase = "after"
"""When an evaluation was made, as seen from training: `phase` of its row."""


class MetricsLog:
    """`metrics.jsonl`, open for appending; a row survives the death of the process when `write`
    returns, and of the machine after `sync`.

    Args:
        directory: the run directory.
        step: the step that the run is continued from; rows of later steps, written by a run that
            was killed, are set aside in `metrics.superseded.jsonl`.
        trackers: receive each row too.
        warn: told what is set aside, and which steps have no row.

    """

    def __init__(
        self,
        directory: Path,
        step: int,
        trackers: Trackers | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._trackers, self._directory = trackers, directory
        self.path = directory / FILE
        self._keep(lambda row: row["step"] <= step, warn)
        logged = {row["step"] for row in read_metrics(directory) if row["split"] == "train"}
        if lost := [number for number in range(1, step + 1) if number not in logged]:
            warn(
                f"WARNING: {self.path}: the rows of {len(lost)} steps are lost (the first is step "
                f"{lost[0]}). The run itself has lost nothing."
            )
        self._file = self.path.open("a", encoding="utf-8")

    def evaluation_at(self, step: int) -> dict[str, Any] | None:
        """Return the row of the evaluation during training at this step; None where there is
        none.
        """
        rows = read_metrics(self._directory)
        during = (row for row in rows if phase_of(row) == DURING and row["step"] == step)
        return next(during, None)

    def supersede(self, is_superseded: Callable[[dict[str, Any]], bool]) -> None:
        """Set aside the rows for which `is_superseded` is true."""
        self._file.close()
        self._keep(lambda row: not is_superseded(row))
        self._file = self.path.open("a", encoding="utf-8")

    def _keep(
        self, is_kept: Callable[[dict[str, Any]], bool], warn: Callable[[str], None] | None = None
    ) -> None:
        lines = [(line, _row_of(line)) for line in _lines(self.path)]
        rest = [line for line, row in lines if row is None or not is_kept(row)]
        if not rest:
            return
        with (self._directory / SUPERSEDED).open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in rest)
            file.flush()
            os.fsync(file.fileno())
        write_text(self.path, "".join(line + "\n" for line, row in lines if row and is_kept(row)))
        if warn:
            warn(
                f"{len(rest)} rows of {self.path} are of steps to be done again, or damaged; they "
                f"are in {SUPERSEDED}"
            )

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        self._file.flush()
        if self._trackers:
            self._trackers.write(row)

    def sync(self) -> None:
        """Make what was written durable; a checkpoint must not be newer than the rows before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make the file durable and close it."""
        self.sync()
        self._file.close()
        if self._trackers:
            self._trackers.close()


class NullMetricsLog(MetricsLog):
    """The log of a process that does not write one."""

    def __init__(self) -> None:
        pass

    def write(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def supersede(self, is_superseded: Callable[[dict[str, Any]], bool]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return all whole rows of a run's metrics, without lines that a kill cut short or that are
    damaged.
    """
    rows = (_row_of(line) for line in _lines(directory / FILE))
    return [row for row in rows if row is not None]


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")
    return [line for line in text.split("\n") if line.strip()]


def _row_of(line: str) -> dict[str, Any] | None:
    """Return the row in a line; None where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = (
        isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("split"), str)
    )
    return row if is_row else None


def phase_of(row: dict[str, Any]) -> Phase | None:
    """Return when an evaluation's row was measured; None for a row of training.

    Rows of runs before layout 1 have no `phase`: there those before and after name their task.
    """
    if row["split"] != "eval":
        return None
    if "phase" in row:
        return row["phase"]
    if "task" not in row:
        return DURING
    return BEFORE if row["step"] == 0 else AFTER


def evals_since_best(rows: list[dict[str, Any]], metric: str) -> int:
    """Count the evaluations, from the last one back, that were no better than one before them.

    Args:
        rows: of the log; evaluations before and after training do not count.
        metric: the metric to compare; see `config.schema.lower_is_better`.

    """
    values = [_goodness(row.get(metric), metric) for row in rows if phase_of(row) == DURING]
    return len(values) - 1 - values.index(max(values)) if values else 0


def is_better(value: float, before: float | None, metric: str) -> bool:
    """Return whether a value of a metric is better than the best before; NaN never is.

    Args:
        value: the new one.
        before: the best before; None where there is none.
        metric: its name; see `config.schema.lower_is_better`.

    """
    return _goodness(value, metric) > _goodness(before, metric)


def _goodness(value: Any, metric: str) -> float:
    """Return a number that is larger the better a value is, -inf where there is no finite one."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return -math.inf
    return -float(value) if lower_is_better(metric) else float(value)


def metric_names(row: dict[str, Any]) -> list[str]:
    """Return the names of the metrics in a row of an evaluation, in its order."""
    return [
        name
        for name, value in row.items()
        if name == "perplexity" or (isinstance(value, float) and name != "epoch")
    ]


def flops_per_token(frozen: int, trainable: int) -> float:
    """Return the FLOPs of a training step per token: 4 for a frozen parameter (forward, gradient of
    the activations), 6 for one that trains.
    """
    return 4.0 * frozen + 6.0 * trainable


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity where it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
