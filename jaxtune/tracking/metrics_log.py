"""The rows of a run: `metrics.jsonl`, in which each step stands once."""

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from jaxtune.config.schema import lower_is_better
from jaxtune.core.files import write_jsonl
from jaxtune.tracking.trackers import Trackers

FILE = "metrics.jsonl"
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
            was killed, are removed.
        trackers: receive each row too.

    """

    def __init__(self, directory: Path, step: int, trackers: Trackers | None = None) -> None:
        self._trackers = trackers
        self.path = directory / FILE
        kept = [row for row in read_metrics(directory) if row["step"] <= step]
        write_jsonl(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")

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

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return all whole rows of a run's metrics, without a last line that a kill cut short."""
    path = directory / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows


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
    during = (row for row in rows if phase_of(row) == DURING and row.get(metric) is not None)
    values = [-row[metric] if lower_is_better(metric) else row[metric] for row in during]
    return len(values) - 1 - values.index(max(values)) if values else 0


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
