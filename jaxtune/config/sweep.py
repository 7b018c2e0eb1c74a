"""The typed description of a search over a run's keys."""

from typing import Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rules import RANGE_RULES, SWEEP_RULES
from jaxtune.config.schema import MetricName, Section
from jaxtune.config.types import Count, Seed

Scalar = int | float


class Range(Section):
    """Numbers from `low` to `high`."""

    rules = RANGE_RULES

    low: Scalar
    """The lowest value; whole numbers at both ends give whole numbers."""
    high: Scalar
    """The highest value."""
    log: bool = False
    """Whether values are drawn uniformly on a logarithmic scale."""
    step: Annotated[Scalar, Field(gt=0)] | None = None
    """Draw only low, low + step, low + 2 step ..."""

    @property
    def whole(self) -> bool:
        """Return whether it gives whole numbers."""
        return all(
            isinstance(value, int)
            for value in (self.low, self.high, self.step)
            if value is not None
        )


class Sweep(Section):
    """The description of a search: what is searched, how, and where it is recorded."""

    rules = SWEEP_RULES

    parameters: Annotated[
        dict[str, Range | Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)
    ]
    """Keys of a configuration, each with a list of values or with {low, high, log, step}."""
    metric: MetricName = "loss"
    """The metric of the evaluation after training that trials are compared by; lower is better for
    the loss, higher for all others.
    """
    trials: Count = 20
    """Trials in all, including those of earlier calls."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How values are chosen: from the results so far (Optuna's TPE), at random, or every
    combination of lists.
    """
    pruner: Literal["none", "median", "hyperband", "successive-halving"] = "none"
    """Optuna's pruner, which ends a trial early that does worse than others in its evaluations
    during training (see train.eval_every).
    """
    seed: Seed = 0
    """Seed of the sampler."""
    dir: str = "runs/sweep"
    """The directory of the trials' run directories, the study and the report."""
    storage: str | None = None
    """An Optuna storage, such as a database's URL; null is study.db in dir."""

    @property
    def ranges(self) -> list[str]:
        """Return the parameters that are ranges, not lists."""
        return [key for key, values in self.parameters.items() if isinstance(values, Range)]
