"""The space of a search: which values its keys may take, and how Optuna chooses among them."""

import itertools
import json
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from jaxtune.config.keys import keys
from jaxtune.config.load import with_keys
from jaxtune.config.schema import Config
from jaxtune.config.sweep import Range, Sweep
from jaxtune.core.errors import UserError, nearest


def check_search(base: Config, description: Sweep) -> None:
    """Check that every value of every key makes a configuration, before any is tried.

    Raises:
        UserError: one does not, or trials could not be judged.

    """
    pruner, metric = description.pruner, description.metric
    if base.data.eval is None and base.data.split is None:
        raise UserError("A search judges trials by their evaluation. Set data.eval or data.split.")
    if pruner != "none" and base.train.eval_every is None:
        raise UserError(
            f"pruner: {pruner} goes by the evaluations during training. Set train.eval_every."
        )
    if pruner != "none" and metric not in ("loss", base.checkpoint.best):
        raise UserError(
            f"pruner: {pruner} needs {metric} during training. Set checkpoint.best={metric}, or "
            "metric: loss."
        )
    for key, options in description.parameters.items():
        if key not in keys():
            raise UserError(f"parameters: unknown key '{key}'.{nearest(key, keys())}")
        if key.startswith("run."):
            raise UserError(
                f"parameters: {key} is not searched: every trial has a run directory of its own."
            )
        for value in (options.low, options.high) if isinstance(options, Range) else options:
            with_keys(base, {key: value}, "parameters")


def build_space(description: Sweep) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution of each key."""
    return {key: _distribution(options) for key, options in description.parameters.items()}


def _distribution(options: Range | list[Any]) -> BaseDistribution:
    if not isinstance(options, Range):
        return CategoricalDistribution([to_optuna(value) for value in options])
    if options.whole:
        return IntDistribution(
            int(options.low), int(options.high), log=options.log, step=int(options.step or 1)
        )
    return FloatDistribution(
        float(options.low), float(options.high), log=options.log, step=options.step
    )


def resolve_values(description: Sweep, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the keys' values for a trial's parameters; see `to_optuna`."""
    values = {}
    for key, options in description.parameters.items():
        value = parameters[key]
        if not isinstance(options, Range):
            value = next(option for option in options if to_optuna(option) == value)
        values[key] = value
    return values


def to_optuna(value: Any) -> Any:
    """Return a value as Optuna keeps and plots it: lists and mappings as JSON."""
    return (
        value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
    )


def build_sampler(description: Sweep, trial: int) -> optuna.samplers.BaseSampler:
    """Return a sampler seeded by the trial's number, so that a search that was stopped continues as
    it would have.
    """
    kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    return kinds[description.sampler](seed=description.seed + trial)


def list_grid(description: Sweep) -> list[dict[str, Any]]:
    """Return all combinations, the last key varying fastest.

    Optuna's own grid sampler works in its own loop only.
    """
    lists = [
        [to_optuna(value) for value in options]
        for options in description.parameters.values()
        if not isinstance(options, Range)
    ]
    return [
        dict(zip(description.parameters, values, strict=True))
        for values in itertools.product(*lists)
    ]


def build_pruner(description: Sweep) -> optuna.pruners.BasePruner:
    """Return the pruner, which ends trials that do worse than others."""
    kinds = {
        "none": optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "successive-halving": optuna.pruners.SuccessiveHalvingPruner,
    }  # fmt: skip
    return kinds[description.pruner]()
