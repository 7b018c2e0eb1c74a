"""The page of a search: what was tried, what it gave, and which keys mattered."""

import html
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from jaxtune.config.load import load_sweep
from jaxtune.config.schema import lower_is_better
from jaxtune.config.sweep import Range, Sweep
from jaxtune.core.errors import UserError
from jaxtune.core.files import write_text
from jaxtune.report.charts import curve, drawn
from jaxtune.report.document import Cell, document, ends, grid, number, table
from jaxtune.tracking.metrics_log import AFTER, BEFORE, phase_of, read_metrics

NAME, BASE, STUDY, TRIALS, REPORT = "sweep.yaml", "base.yaml", "study.db", "trials", "report.html"
_LEAST, _MANY = (
    4,
    20,
)  # completed trials for a word on importance, and for one that is to be believed


def trial_directory(directory: Path, number: int) -> Path:
    """The run directory of a trial."""
    return directory / TRIALS / f"{number + 1:03}"


def read_study(directory: Path) -> tuple[optuna.Study, Sweep]:
    """The study in a search's directory, and its description.

    Raises:
        UserError: its description is not one of this version, or its storage cannot be opened.

    """
    plan = load_sweep(directory / NAME)
    return open_study(plan, directory), plan


def open_study(
    plan: Sweep, directory: Path, pruner: optuna.pruners.BasePruner | None = None
) -> optuna.Study:
    """The study, made where there is none yet.

    Raises:
        UserError: its storage cannot be used.

    """
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage, name = (
        (plan.storage, plan.dir)
        if plan.storage
        else (f"sqlite:///{(directory / STUDY).resolve()}", NAME)
    )
    direction = "minimize" if lower_is_better(plan.metric) else "maximize"
    try:
        return optuna.create_study(
            storage=storage,
            study_name=name,
            direction=direction,
            pruner=pruner,
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise UserError(
            f"storage: {storage} cannot be used: {str(error).splitlines()[0]}"
        ) from None


def write_sweep_report(study: optuna.Study, plan: Sweep, directory: Path) -> Path:
    """Write the page into the search's directory."""
    out = directory / REPORT
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    body = [
        f"<h1>{html.escape(str(directory))}: {len(done)} of {plan.trials} trials, by "
        f"{plan.metric}</h1>"
    ]
    body += [_best(study, directory)] if done else []
    body += [_trials(study, plan, directory), _plots(study, plan, done), _curves(study, directory)]
    write_text(out, document(str(directory), body))
    return out


def _best(study: optuna.Study, directory: Path) -> str:
    best = study.best_trial
    keys = " ".join(f"{key}={value}" for key, value in best.params.items())
    return f"<p>The best is {_link(best, directory)}: {number(best.value)}.</p><pre>{html.escape(keys)}</pre>"


def _trials(study: optuna.Study, plan: Sweep, directory: Path) -> str:
    ordered = sorted(study.get_trials(deepcopy=False), key=lambda trial: _rank(trial, study))
    rows = []
    for trial in ordered:
        last = next(
            (row for row in reversed(_rows(trial, directory)) if phase_of(row) in (BEFORE, AFTER)),
            {},
        )
        bounds = (
            ends(last.get("intervals", {}).get(plan.metric))
            if trial.state == TrialState.COMPLETE
            else ""
        )
        said = trial.user_attrs.get("reason") or (
            f"as trial {trial.user_attrs['same as'] + 1}" if "same as" in trial.user_attrs else ""
        )
        value = "" if trial.value is None else trial.value
        values = [trial.params.get(key, "") for key in plan.parameters]
        rows.append(
            [
                _link(trial, directory),
                *values,
                value,
                bounds,
                f"{_STATES.get(trial.state, '')} {said}".strip(),
            ]
        )
    return f"<h2>Trials, the best first</h2>{table(['trial', *plan.parameters, plan.metric, '95% interval', ''], rows)}"


_STATES = {
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "failed:",
    TrialState.RUNNING: "not finished",
}


def _rank(trial: FrozenTrial, study: optuna.Study) -> tuple[bool, float]:
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return True, trial.number
    return (
        False,
        trial.value if study.direction == optuna.study.StudyDirection.MINIMIZE else -trial.value,
    )


def _plots(study: optuna.Study, plan: Sweep, done: list[FrozenTrial]) -> str:
    if len(done) < 2:
        return ""
    charts = [_history(study, plan, done)]
    varied = [key for key in plan.parameters if len({str(trial.params[key]) for trial in done}) > 1]
    note = ""
    importances = importance(study, varied) if len(done) >= _LEAST and varied else {}
    if importances:
        charts.append(_bars(importances))
        few = f" {len(done)} trials are few: take it as a hint." if len(done) < _MANY else ""
        note = f'<p class="muted">Importance is what tells the better half of the trials from all of them (PED-ANOVA).{few}</p>'
    charts += [_by_key(plan, key, done) for key in varied]
    if len(varied) > 1:
        together = optuna.visualization.plot_parallel_coordinate(
            study, params=varied, target_name=plan.metric
        )
        charts.append(drawn(together, "All keys at once"))
    return f"<h2>What mattered</h2>{note}{grid(charts)}"


def _history(study: optuna.Study, plan: Sweep, done: list[FrozenTrial]) -> str:
    less = study.direction == optuna.study.StudyDirection.MINIMIZE
    numbers, values = (
        [trial.number + 1 for trial in done],
        [float(trial.value or 0) for trial in done],
    )
    best = np.minimum.accumulate(values) if less else np.maximum.accumulate(values)
    figure = go.Figure(
        [
            go.Scatter(x=numbers, y=values, mode="markers", name="trial"),
            go.Scatter(x=numbers, y=best, name="best so far"),
        ]
    )
    return drawn(figure, f"{plan.metric}, trial after trial", xaxis_title="trial")


def _by_key(plan: Sweep, key: str, done: list[FrozenTrial]) -> str:
    options = plan.parameters[key]
    along = (
        {"type": "log"}
        if isinstance(options, Range) and options.log
        else {}
        if isinstance(options, Range)
        else {"type": "category"}
    )
    names = [f"trial {trial.number + 1}" for trial in done]
    dots = go.Scatter(
        x=[trial.params[key] for trial in done],
        y=[trial.value for trial in done],
        text=names,
        mode="markers",
    )
    return drawn(go.Figure(dots), f"{plan.metric} by {key}", xaxis={"title": key, **along})


def importance(study: optuna.Study, keys: list[str]) -> dict[str, float]:
    """How much each key mattered, in shares (Watanabe et al. 2023, PED-ANOVA): what tells the
    better half of the trials from all.

    Nothing where Optuna cannot tell, such as of trials that are all as good.
    """
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(
        target_quantile=0.5, region_quantile=1.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return optuna.importance.get_param_importances(study, evaluator=evaluator, params=keys)
        except UserWarning:
            return {}


def _bars(importances: dict[str, float]) -> str:
    names = list(reversed(importances))
    return drawn(
        go.Figure(go.Bar(x=[importances[name] for name in names], y=names, orientation="h")),
        "Importance of keys",
    )


def _curves(study: optuna.Study, directory: Path) -> str:
    losses: dict[str, tuple[list, list]] = {}
    evaluations: dict[str, tuple[list, list]] = {}
    for trial in study.get_trials(deepcopy=False):
        rows = _rows(trial, directory)
        name = f"trial {trial.number + 1}"
        for split, found in (("train", losses), ("eval", evaluations)):
            points = [
                (row["step"], row["loss"])
                for row in rows
                if row["split"] == split and row.get("loss") is not None
            ]
            if points:
                found[name] = [x for x, _ in points], [y for _, y in points]
    if not losses:
        return ""
    return f"<h2>Curves</h2>{grid([curve('Training loss', losses), curve('Evaluation loss', evaluations)])}"


def _rows(trial: FrozenTrial, directory: Path) -> list[dict[str, Any]]:
    return read_metrics(trial_directory(directory, trial.number))


def _link(trial: FrozenTrial, directory: Path) -> Cell:
    name = f"trial {trial.number + 1}"
    page = trial_directory(directory, trial.number) / REPORT
    return Cell(f'<a href="{page.relative_to(directory)}">{name}</a>' if page.exists() else name)
