"""A search over the keys of a run: Optuna chooses, each trial is a run directory, and a search that
was stopped can be continued.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import optuna
import yaml
from optuna.trial import FrozenTrial, Trial, TrialState

from jaxtune.config.keys import keys_with
from jaxtune.config.load import load_config, load_sweep, with_keys
from jaxtune.config.schema import Config
from jaxtune.config.sweep import Sweep
from jaxtune.config.traits import Trait
from jaxtune.core import distributed, runtime
from jaxtune.core.errors import Interrupted, RunError, UserError, listed
from jaxtune.core.files import read_jsonl, write_jsonl, write_text
from jaxtune.core.locks import Lock, LockHeldError
from jaxtune.report.sweep import (
    BASE,
    NAME,
    REPORT,
    STUDY,
    TRIALS,
    open_study,
    trial_directory,
    write_sweep_report,
)
from jaxtune.tracking.metrics_log import BEFORE, metric_names, phase_of, read_metrics
from jaxtune.tracking.metrics_log import FILE as METRICS
from jaxtune.tracking.ownership import MARKER, SAMPLES, read_marker, write_marker
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import write_config
from jaxtune.training.callbacks import Callback
from jaxtune.training.state import TrainState
from jaxtune.workflows.search_space import (
    build_pruner,
    build_sampler,
    build_space,
    check_search,
    list_grid,
    resolve_values,
    to_optuna,
)
from jaxtune.workflows.train import run

_STARTS, _REASON, _SAME = "starts", "reason", "same as"
_MAX_STARTS = 3  # a trial that brings the program down this often has failed

# Errors that cost only the trial; JAX's is, among others, that a device's memory is too small.
_TRIAL_ERRORS = (RunError, UserError, jax.errors.JaxRuntimeError)


class _NoSuchMetric(Exception):
    """The evaluation lacks the metric that trials are judged by."""


def sweep(config: Path, description: Path | Sweep, reporter: Reporter) -> optuna.Study:
    """Search as `description` says, or continue where an earlier call was stopped.

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
    file = "SWEEP.yaml" if isinstance(description, Sweep) else description
    if not isinstance(description, Sweep):
        description = load_sweep(description)
    directory, base = Path(description.dir), load_config(config)
    check_search(base, description)
    with _locked(directory):
        _refuse_another(directory, base, description)
        study = open_study(description, directory, build_pruner(description))
        _record(directory, base, description)
        search = _Search(study, description, base, directory, reporter)
        try:
            search.run()
        except Interrupted as stopped:
            raise Interrupted(
                stopped.number,
                f"Stopped in trial {search.current + 1}; what was done is kept.\n"
                f"Go on with: jaxtune sweep {config} {file}",
            ) from None
        except _NoSuchMetric as error:
            if len(study.trials) == 1:
                _remove(directory)
            raise UserError(str(error)) from None
    if not study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]):
        reasons = {trial.user_attrs.get(_REASON, "") for trial in study.trials}
        raise UserError(f"Every trial failed. {listed(sorted(reasons), 3)}")
    return study


class _Search:
    """The trials of a search, one after the other.

    Attributes:
        current: the number of the trial at hand.

    """

    def __init__(
        self,
        study: optuna.Study,
        description: Sweep,
        base: Config,
        directory: Path,
        reporter: Reporter,
    ) -> None:
        self.study, self.description, self.base = study, description, base
        self.directory, self.reporter = directory, reporter
        self.current = 0

    def run(self) -> None:
        """Run the trials that have begun and not finished, then new ones."""
        for begun in self.study.get_trials(states=[TrialState.RUNNING]):
            self._run_trial(Trial(self.study, begun._trial_id))
        grid = list_grid(self.description) if self.description.sampler == "grid" else None
        total = self.description.trials
        total = total if grid is None else min(total, len(grid))
        while (number := len(self.study.trials)) < total:
            if grid is None:
                self.study.sampler = build_sampler(self.description, number)
            else:
                self.study.enqueue_trial(grid[number])
            self._run_trial(self.study.ask(build_space(self.description)))

    def _run_trial(self, trial: Trial) -> None:
        self.current = trial.number
        values = resolve_values(self.description, trial.params)
        starts = trial.user_attrs.get(_STARTS, 0) + 1
        trial.set_user_attr(_STARTS, starts)
        settings = ", ".join(f"{key}={to_optuna(value)}" for key, value in values.items())
        self.reporter.say(
            f"\nTrial {trial.number + 1} of {self.description.trials}: {settings}"
            + (" (goes on)" if starts > 1 else "")
        )
        if starts > _MAX_STARTS:
            self._fail(trial, f"the program ended {_MAX_STARTS} times while it ran")
        elif (twin := self._find_twin(trial)) is not None:
            trial.set_user_attr(_SAME, twin.number)
            self.reporter.say(
                f"The same as trial {twin.number + 1}, so its {self.description.metric} is taken: "
                f"{twin.value:.4f}"
            )
            self.study.tell(trial.number, twin.value)
        else:
            self._train(trial, values)
        write_sweep_report(self.study, self.description, self.directory)

    def _find_twin(self, trial: Trial) -> FrozenTrial | None:
        """Return a completed trial of the same values."""
        done = self.study.get_trials(states=[TrialState.COMPLETE])
        twins = (
            other
            for other in done
            if other.params == trial.params and _SAME not in other.user_attrs
        )
        return next(twins, None)

    def _train(self, trial: Trial, values: dict[str, Any]) -> None:
        directory = trial_directory(self.directory, trial.number)
        self._copy_start(directory)
        try:
            places = {"run.dir": str(directory)}
            if checkpoints := self.base.checkpoint.dir:
                places["checkpoint.dir"] = f"{checkpoints.rstrip('/')}/{directory.name}"
            config = with_keys(self.base, values | places, "parameters")
            result = run(config, self.reporter, callbacks=[_ReportToStudy(self, trial)])
        except optuna.TrialPruned:
            self.study.tell(trial.number, state=TrialState.PRUNED)
            self.reporter.say(
                f"Trial {trial.number + 1} is worse than others at this point and ends here "
                "(pruner)"
            )
        except Interrupted:
            # The trial was asked to stop; it did not bring the program down.
            trial.set_user_attr(_STARTS, trial.user_attrs[_STARTS] - 1)
            raise
        except _TRIAL_ERRORS as error:
            self._fail(trial, str(error).splitlines()[0])
        else:
            self._complete(trial, (result.after or {}).get(self.description.metric))

    def _complete(self, trial: Trial, value: float | None) -> None:
        metric = self.description.metric
        if value is None or not math.isfinite(value):
            self._fail(trial, f"the evaluation's {metric} is not finite")
            return
        self.study.tell(trial.number, value)
        best = self.study.best_trial
        self.reporter.say(
            f"{metric} {value:.4f}; best so far {best.value:.4f} (trial {best.number + 1})"
        )

    def _fail(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr(_REASON, reason)
        self.study.tell(trial.number, state=TrialState.FAIL)
        self.reporter.say(f"Trial {trial.number + 1} failed: {reason}")

    def report(self, trial: Trial, step: int, metrics: dict[str, Any]) -> None:
        """Report an evaluation to the study.

        Raises:
            TrialPruned: the trial is worse than others at this point.

        """
        metric = self.description.metric
        if step == 0 and metric not in metrics:
            names = ", ".join(metric_names(metrics))
            raise _NoSuchMetric(
                f"metric: {metric}: the evaluation has {names}. Take one of these, or set "
                "train.eval_task."
            )
        value = metrics.get(metric)
        # A trial that is continued reported some steps before.
        reported = self.study.trials[trial.number].intermediate_values
        if step > 0 and value is not None and step not in reported:
            trial.report(float(value), step)
            if trial.should_prune():
                raise optuna.TrialPruned

    def _copy_start(self, directory: Path) -> None:
        """Copy what an earlier trial measured before training, where that is the same for all."""
        if (
            directory.exists()
            or not self.description.parameters.keys() <= keys_with(Trait.KEEPS_START)
            or self.base.adapter.init
        ):
            return
        for other in sorted((self.directory / TRIALS).glob("*")):
            rows = [row for row in read_metrics(other)[:1] if phase_of(row) == BEFORE]
            if rows and (other / SAMPLES).exists():
                directory.mkdir(parents=True)
                write_marker(directory, "run", {})
                write_jsonl(
                    directory / METRICS, [{"measured_in": other.name} | row for row in rows]
                )
                samples = [{**row, "during": []} for row in read_jsonl(other / SAMPLES)]
                for sample in samples:
                    sample.pop("after", None)
                write_jsonl(directory / SAMPLES, samples)
                return


class _ReportToStudy(Callback):
    """Reports a trial's evaluations to the study; what the study raises ends the trial."""

    def __init__(self, search: _Search, trial: Trial) -> None:
        self._search, self._trial = search, trial

    def on_evaluation(self, step: int, metrics: dict[str, Any], state: TrainState) -> None:
        """Report one evaluation."""
        self._search.report(self._trial, step, metrics)


def _refuse_another(directory: Path, base: Config, description: Sweep) -> None:
    """Check that a directory holds nothing, or this search.

    Raises:
        UserError: it holds another one, or something that no search made is in the way.

    """
    marker = read_marker(directory, "search")
    # A search of an earlier version has no marker.
    is_known = marker is not None or all((directory / name).exists() for name in (BASE, STUDY))
    names = (NAME, BASE, STUDY, TRIALS, REPORT)
    if not is_known and (others := [name for name in names if (directory / name).exists()]):
        raise UserError(
            f"{directory} is not a search's directory, and holds {listed(others)}, which a search "
            "would overwrite. Set dir to another directory."
        )
    if marker is None:
        write_marker(directory, "search", {})
    if not (directory / NAME).exists():
        return
    before = yaml.safe_load((directory / NAME).read_text(encoding="utf-8"))
    now = description.model_dump(mode="json")
    changed = [key for key in ("parameters", "metric") if before[key] != now[key]]
    if yaml.safe_load((directory / BASE).read_text()) != base.model_dump(mode="json"):
        changed.append("the configuration")
    if changed:
        raise UserError(
            f"{directory} holds a search with another {listed(changed)}. Set dir to another "
            "directory, or remove it."
        )


def _record(directory: Path, base: Config, description: Sweep) -> None:
    """Write down what is searched."""
    write_config(directory / BASE, base)
    write_text(
        directory / NAME,
        yaml.safe_dump(description.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def _remove(directory: Path) -> None:
    """Remove a search in which nothing was trained, so that its description can be corrected."""
    for name in (NAME, BASE, STUDY, MARKER):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / TRIALS, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a search's directory.

    Raises:
        UserError: another search holds the lock.

    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(directory / ".lock")
    except LockHeldError as holder:
        raise UserError(
            f"{directory}: another jaxtune sweep is at work there ({holder})."
        ) from None
    try:
        yield
    finally:
        lock.close()
