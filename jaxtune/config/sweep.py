"""The typed description of a search over a run's keys."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxtune.config.schema import Count, MetricName, Section

Scalar = int | float


class Range(Section):
    """Numbers from `low` to `high`."""

    low: Scalar
    """The least; whole numbers at both ends give whole numbers."""
    high: Scalar
    """The most."""
    log: bool = False
    """Whether drawn evenly on a logarithmic scale."""
    step: Annotated[Scalar, Field(gt=0)] | None = None
    """Only low, low + step, low + 2 step ..."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether it gives whole numbers."""
        return all(
            isinstance(value, int)
            for value in (self.low, self.high, self.step)
            if value is not None
        )


class Sweep(Section):
    """What is searched, how, and where it is recorded."""

    parameters: Annotated[
        dict[str, Range | Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)
    ]
    """Keys of a configuration, each with a list of values or with {low, high, log, step}."""
    metric: MetricName = "loss"
    """By which trials are judged, from the evaluation after training; less is better of the
    loss, more of anything else.
    """
    trials: Count = 20
    """How many in all, those of earlier calls counted."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How values are chosen: by what went well before (Optuna's TPE), at random, or all
    combinations of lists.
    """
    pruner: Literal["none", "median", "hyperband", "successive-halving"] = "none"
    """Whether a trial ends early that is worse on the way (see train.eval_every); Optuna's
    pruners.
    """
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the sampler."""
    dir: str = "runs/sweep"
    """Where the trials' run directories, the study and the report lie."""
    storage: str | None = None
    """An Optuna storage of your own, such as a database's URL; null is study.db in dir."""

    @model_validator(mode="after")
    def _a_grid_is_of_lists(self) -> "Sweep":
        if self.sampler == "grid" and any(
            isinstance(values, Range) for values in self.parameters.values()
        ):
            raise ValueError(
                "sampler: grid takes lists of values, and a parameter has a range. Write the "
                "values out, or take tpe"
            )
        return self
