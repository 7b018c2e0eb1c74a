"""A search over the keys of a run: Optuna chooses, each trial is a run directory, and a search
that was stopped goes on.
"""

import fcntl
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState

from jaxtune.config.keys import keys, keys_with
from jaxtune.config.load import dump, load_config, load_sweep, with_keys
from jaxtune.config.schema import Config
from jaxtune.config.sweep import Range, Sweep
from jaxtune.config.traits import Trait
from jaxtune.core import distributed, runtime
from jaxtune.core.errors import Interrupted, RunError, UserError, listed, nearest
from jaxtune.core.files import read_jsonl, write_jsonl, write_text
from jaxtune.report.sweep import (
    BASE,
    NAME,
    STUDY,
    TRIALS,
    open_study,
    trial_directory,
    write_sweep_report,
)
from jaxtune.tracking.metrics_log import BEFORE, metric_names, phase_of, read_metrics
from jaxtune.tracking.metrics_log import FILE as METRICS
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.run_directory import SAMPLES
from jaxtune.training.callbacks import Callback
from jaxtune.training.state import TrainState
from jaxtune.workflows.train import run

_STARTS, _REASON, _SAME = "starts", "reason", "same as"
_MOST_STARTS = 3  # a trial that has ended the program so often is given up

# What a trial may end with that costs only this trial; the last is, for one, a device's memory that
# is too small for it.
_COSTS_A_TRIAL = (RunError, UserError, jax.errors.JaxRuntimeError)


class _NoSuchFigure(Exception):
    """The evaluation has not what trials are judged by."""


def sweep(config: Path, description: Path | Sweep, reporter: Reporter) -> optuna.Study:
    """Search as `description` says, or go on where an earlier call was stopped.

    Args:
        config: the YAML file of the run whose keys are varied.
        description: the search, or its YAML file.
        reporter: where progress is shown.

    Raises:
        UserError: anything that is wrong with the two, or every trial failed.
        Interrupted: Ctrl-C or SIGTERM came; what was done is kept.

    """
    runtime.start()
    distributed.require_single_process("jaxtune sweep")
    plan = description if isinstance(description, Sweep) else load_sweep(description)
    directory, base = Path(plan.dir), load_config(config)
    _check(base, plan)
    with _locked(directory):
        _refuse_another(directory, base, plan)
        study = open_study(plan, directory, _pruner(plan))
        _record(directory, base, plan)
        search = _Search(study, plan, base, directory, reporter)
        try:
            search.run()
        except Interrupted as stopped:
            how = f"Go on with: jaxtune sweep {config} {'SWEEP.yaml' if isinstance(description, Sweep) else description}"
            raise Interrupted(
                stopped.number, f"Stopped in trial {search.at + 1}; what was done is kept.\n{how}"
            ) from None
        except _NoSuchFigure as error:
            if len(study.trials) == 1:
                _forget(directory)
            raise UserError(str(error)) from None
    if not study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]):
        reasons = {trial.user_attrs.get(_REASON, "") for trial in study.trials}
        raise UserError(f"Every trial failed. {listed(sorted(reasons), 3)}")
    return study


class _Search:
    """The trials, one after the other.

    Attributes:
        at: the number of the trial that is run.

    """

    def __init__(
        self, study: optuna.Study, plan: Sweep, base: Config, directory: Path, reporter: Reporter
    ) -> None:
        self.study, self.plan, self.base, self.directory, self.reporter = (
            study,
            plan,
            base,
            directory,
            reporter,
        )
        self.at = 0

    def run(self) -> None:
        """Those that were begun and not finished first, then new ones."""
        for begun in self.study.get_trials(states=[TrialState.RUNNING]):
            self._trial(Trial(self.study, begun._trial_id))
        grid = _grid(self.plan) if self.plan.sampler == "grid" else None
        total = self.plan.trials if grid is None else min(self.plan.trials, len(grid))
        while (number := len(self.study.trials)) < total:
            if grid is None:
                self.study.sampler = _sampler(self.plan, number)
            else:
                self.study.enqueue_trial(grid[number])
            self._trial(self.study.ask(_space(self.plan)))

    def _trial(self, trial: Trial) -> None:
        self.at = trial.number
        values = _values(self.plan, trial.params)
        starts = trial.user_attrs.get(_STARTS, 0) + 1
        trial.set_user_attr(_STARTS, starts)
        chosen = ", ".join(f"{key}={_written(value)}" for key, value in values.items())
        self.reporter.say(
            f"\nTrial {trial.number + 1} of {self.plan.trials}: {chosen}"
            + (" (goes on)" if starts > 1 else "")
        )
        if starts > _MOST_STARTS:
            self._failed(trial, f"the program ended {_MOST_STARTS} times while it ran")
        elif (twin := self._twin(trial)) is not None:
            trial.set_user_attr(_SAME, twin.number)
            self.reporter.say(
                f"The same as trial {twin.number + 1}, so its {self.plan.metric} is taken: "
                f"{twin.value:.4f}"
            )
            self.study.tell(trial.number, twin.value)
        else:
            self._trained(trial, values)
        write_sweep_report(self.study, self.plan, self.directory)

    def _twin(self, trial: Trial) -> FrozenTrial | None:
        done = self.study.get_trials(states=[TrialState.COMPLETE])
        return next(
            (
                other
                for other in done
                if other.params == trial.params and _SAME not in other.user_attrs
            ),
            None,
        )

    def _trained(self, trial: Trial, values: dict[str, Any]) -> None:
        directory = trial_directory(self.directory, trial.number)
        self._lend_the_start(directory)
        try:
            places = {"run.dir": str(directory)}
            if self.base.checkpoint.dir:
                places["checkpoint.dir"] = (
                    f"{self.base.checkpoint.dir.rstrip('/')}/{directory.name}"
                )
            config = with_keys(self.base, values | places, "parameters")
            result = run(
                config,
                self.reporter,
                callbacks=[_TellStudy(self, trial)],
            )
        except optuna.TrialPruned:
            self.study.tell(trial.number, state=TrialState.PRUNED)
            self.reporter.say(
                f"Trial {trial.number + 1} is worse than others at this point and ends here "
                "(pruner)"
            )
        except Interrupted:
            # It was asked to stop, and did not bring the program down.
            trial.set_user_attr(_STARTS, trial.user_attrs[_STARTS] - 1)
            raise
        except _COSTS_A_TRIAL as error:
            self._failed(trial, str(error).splitlines()[0])
        else:
            self._judged(trial, (result.after or {}).get(self.plan.metric))

    def _judged(self, trial: Trial, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            self._failed(trial, f"the evaluation's {self.plan.metric} is not finite")
            return
        self.study.tell(trial.number, value)
        best = self.study.best_trial
        self.reporter.say(
            f"{self.plan.metric} {value:.4f}; best so far {best.value:.4f} (trial "
            f"{best.number + 1})"
        )

    def _failed(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr(_REASON, reason)
        self.study.tell(trial.number, state=TrialState.FAIL)
        self.reporter.say(f"Trial {trial.number + 1} failed: {reason}")

    def tell(self, trial: Trial, step: int, figures: dict[str, Any]) -> None:
        """Tell the study of an evaluation.

        Raises:
            TrialPruned: the trial is worse than others at this point.

        """
        if step == 0 and self.plan.metric not in figures:
            names = ", ".join(metric_names(figures))
            raise _NoSuchFigure(
                f"metric: {self.plan.metric}: the evaluation has {names}. Take one of these, or "
                "set train.eval_task."
            )
        value = figures.get(self.plan.metric)
        told = self.study.trials[
            trial.number
        ].intermediate_values  # of a trial that goes on, some were told before
        if step > 0 and value is not None and step not in told:
            trial.report(float(value), step)
            if trial.should_prune():
                raise optuna.TrialPruned

    def _lend_the_start(self, directory: Path) -> None:
        """What an earlier trial measured before training, where that is the same for all."""
        if (
            directory.exists()
            or not self.plan.parameters.keys() <= keys_with(Trait.KEEPS_START)
            or self.base.adapter.init
        ):
            return
        for other in sorted((self.directory / TRIALS).glob("*")):
            if (other / SAMPLES).exists():
                rows = [
                    row for row in read_metrics(other)[:1] if phase_of(row) == BEFORE
                ]
                if rows:
                    directory.mkdir(parents=True)
                    write_jsonl(
                        directory / METRICS, [{"measured_in": other.name} | row for row in rows]
                    )
                    kept = [{**row, "during": []} for row in read_jsonl(other / SAMPLES)]
                    write_jsonl(
                        directory / SAMPLES,
                        [{name: row[name] for name in row if name != "after"} for row in kept],
                    )
                    return


class _TellStudy(Callback):
    """Tells the study of a trial's evaluations; what the study raises ends the trial."""

    def __init__(self, search: _Search, trial: Trial) -> None:
        self._search, self._trial = search, trial

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> None:
        """Tell of one evaluation."""
        self._search.tell(self._trial, step, metrics)


def _check(base: Config, plan: Sweep) -> None:
    """Whether every value of every key makes a configuration, before any is tried."""
    if base.data.eval is None and base.data.split is None:
        raise UserError("A search judges trials by their evaluation. Set data.eval or data.split.")
    if plan.pruner != "none" and base.train.eval_every is None:
        raise UserError(
            f"pruner: {plan.pruner} looks at evaluations on the way. Set train.eval_every."
        )
    if plan.pruner != "none" and plan.metric not in ("loss", base.checkpoint.best):
        raise UserError(
            f"pruner: {plan.pruner} needs {plan.metric} on the way. Set "
            f"checkpoint.best={plan.metric}, or metric: loss."
        )
    for key, options in plan.parameters.items():
        if key not in keys():
            raise UserError(f"parameters: unknown key '{key}'.{nearest(key, keys())}")
        if key.startswith("run."):
            raise UserError(
                f"parameters: {key} is not searched: every trial has a run directory of its own."
            )
        for value in (options.low, options.high) if isinstance(options, Range) else options:
            with_keys(base, {key: value}, "parameters")


def _refuse_another(directory: Path, base: Config, plan: Sweep) -> None:
    """Another search is not mixed into one.

    Raises:
        UserError: the directory holds another.

    """
    if not (directory / NAME).exists():
        return
    shown, before = (
        plan.model_dump(mode="json"),
        yaml.safe_load((directory / NAME).read_text(encoding="utf-8")),
    )
    changed = [key for key in ("parameters", "metric") if before[key] != shown[key]]
    changed += (
        []
        if yaml.safe_load((directory / BASE).read_text()) == base.model_dump(mode="json")
        else ["the configuration"]
    )
    if changed:
        raise UserError(
            f"{directory} holds a search with another {listed(changed)}. Set dir to another "
            "directory, or remove it."
        )


def _record(directory: Path, base: Config, plan: Sweep) -> None:
    """Note what is searched."""
    write_text(directory / BASE, dump(base))
    write_text(
        directory / NAME,
        yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def _forget(directory: Path) -> None:
    """Remove a search that never was one, so that its description can be mended."""
    for name in (NAME, BASE, STUDY):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / TRIALS, ignore_errors=True)


def _space(plan: Sweep) -> dict[str, BaseDistribution]:
    return {key: _distribution(options) for key, options in plan.parameters.items()}


def _distribution(options: Range | list[Any]) -> BaseDistribution:
    if not isinstance(options, Range):
        return CategoricalDistribution([_written(value) for value in options])
    if options.whole:
        return IntDistribution(
            int(options.low), int(options.high), log=options.log, step=int(options.step or 1)
        )
    return FloatDistribution(
        float(options.low), float(options.high), log=options.log, step=options.step
    )


def _values(plan: Sweep, chosen: dict[str, Any]) -> dict[str, Any]:
    """The keys' values; of lists Optuna knows what is written, which is also what its plots
    show.
    """
    found = {}
    for key, options in plan.parameters.items():
        value = chosen[key]
        found[key] = (
            value
            if isinstance(options, Range)
            else next(one for one in options if _written(one) == value)
        )
    return found


def _written(value: Any) -> Any:
    return (
        value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
    )


def _sampler(plan: Sweep, trial: int) -> optuna.samplers.BaseSampler:
    """Seeded by the trial's number, so that a search that was stopped goes on as it would have."""
    kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    return kinds[plan.sampler](seed=plan.seed + trial)


def _grid(plan: Sweep) -> list[dict[str, Any]]:
    """All combinations, the last key varying fastest. Optuna's own sampler of grids works in its
    own loop only.
    """
    lists = [
        [_written(value) for value in options]
        for options in plan.parameters.values()
        if not isinstance(options, Range)
    ]
    return [dict(zip(plan.parameters, values, strict=True)) for values in itertools.product(*lists)]


def _pruner(plan: Sweep) -> optuna.pruners.BasePruner:
    kinds = {
        "none": optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "successive-halving": optuna.pruners.SuccessiveHalvingPruner,
    }  # fmt: skip
    return kinds[plan.pruner]()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Of two searches in one directory the second is refused."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{directory}: another jaxtune sweep is at work there.") from None
        yield
