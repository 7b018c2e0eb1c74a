"""The page of a search: its trials, their results, and which keys mattered."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState

from jaxtune.config.load import load_sweep
from jaxtune.config.schema import lower_is_better
from jaxtune.config.sweep import Range, Sweep
from jaxtune.core.errors import UserError, first_line
from jaxtune.core.files import write_text
from jaxtune.report.charts import curve, draw
from jaxtune.report.document import document, grid, interval_text, number_text, table
from jaxtune.report.fields import as_number, as_object, objects
from jaxtune.tracking.metrics_log import AFTER, BEFORE, phase_of, read_metrics

NAME, BASE, STUDY, TRIALS, REPORT = "sweep.yaml", "base.yaml", "study.db", "trials", "report.html"
_STATES = {
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "failed:",
    TrialState.RUNNING: "not finished",
}
_MIN_TRIALS = 4  # completed trials from which importance is estimated
_FEW_TRIALS = 20  # below which the estimate is called a hint


def trial_directory(directory: Path, number: int) -> Path:
    """Return the run directory of a trial."""
    return directory / TRIALS / f"{number + 1:03}"


def read_study(directory: Path) -> tuple[optuna.Study, Sweep]:
    """Return the study in a search's directory, and its description.

    Raises:
        UserError: this version cannot read its description, or its storage cannot be opened.

    """
    sweep = load_sweep(directory / NAME)
    return open_study(sweep, directory), sweep


def open_study(
    sweep: Sweep, directory: Path, pruner: optuna.pruners.BasePruner | None = None
) -> optuna.Study:
    """Open the study of a search, or create it.

    Raises:
        UserError: its storage cannot be used.

    """
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage, name = (
        (sweep.storage, sweep.dir)
        if sweep.storage
        else (f"sqlite:///{(directory / STUDY).resolve()}", NAME)
    )
    direction = "minimize" if lower_is_better(sweep.metric) else "maximize"
    try:
        return optuna.create_study(
            storage=storage,
            study_name=name,
            direction=direction,
            pruner=pruner,
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise UserError(f"storage: {storage} cannot be used: {first_line(error)}") from None


def write_sweep_report(study: optuna.Study, sweep: Sweep, directory: Path) -> Path:
    """Write the page into the search's directory."""
    out = directory / REPORT
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    title = f"{directory}: {len(done)} of {sweep.trials} trials, by {sweep.metric}"
    body = [Markup("<h1>{}</h1>").format(title)]
    body += [_best(study, directory)] if done else []
    body += [
        _trials(study, sweep, directory),
        _plots(study, sweep, done),
        _curves(study, directory),
    ]
    write_text(out, document(str(directory), body, evaluates=True))
    return out


def _best(study: optuna.Study, directory: Path) -> Markup:
    best = study.best_trial
    keys = " ".join(f"{key}={value}" for key, value in best.params.items())
    return Markup("<p>The best is {}: {}.</p><pre>{}</pre>").format(
        _link(best, directory), number_text(best.value), keys
    )


def _trials(study: optuna.Study, sweep: Sweep, directory: Path) -> Markup:
    ordered = sorted(study.get_trials(deepcopy=False), key=lambda trial: _rank(trial, study))
    rows = []
    for trial in ordered:
        value = "" if trial.value is None else trial.value
        values = [trial.params.get(key, "") for key in sweep.parameters]
        interval = _interval(trial, sweep.metric, directory)
        rows.append([_link(trial, directory), *values, value, interval, _state(trial)])
    head = ["trial", *sweep.parameters, sweep.metric, "95% interval", ""]
    return Markup("<h2>Trials, the best first</h2>{}").format(table(head, rows))


def _interval(trial: FrozenTrial, metric: str, directory: Path) -> str:
    if trial.state != TrialState.COMPLETE:
        return ""
    evaluations = [row for row in _rows(trial, directory) if phase_of(row) in (BEFORE, AFTER)]
    intervals = as_object(evaluations[-1].get("intervals")) if evaluations else {}
    return interval_text(intervals.get(metric))


def _state(trial: FrozenTrial) -> str:
    twin = trial.user_attrs.get("same as")
    number = as_number(twin)
    note = trial.user_attrs.get("reason") or ("" if number is None else f"as trial {number + 1:g}")
    return f"{_STATES.get(trial.state, '')} {note}".strip()


def _rank(trial: FrozenTrial, study: optuna.Study) -> tuple[bool, float]:
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return True, trial.number
    return False, trial.value if _is_minimized(study) else -trial.value


def _plots(study: optuna.Study, sweep: Sweep, done: list[FrozenTrial]) -> Markup:
    if len(done) < 2:
        return Markup("")
    charts = [_history(study, sweep, done)]
    varied = [
        key for key in sweep.parameters if len({str(trial.params[key]) for trial in done}) > 1
    ]
    note = Markup("")
    importances = importance(study, varied) if len(done) >= _MIN_TRIALS and varied else {}
    if importances:
        charts.append(_bars(importances))
        text = "Importance: how a key tells the better half of the trials from all (PED-ANOVA)."
        if len(done) < _FEW_TRIALS:
            text += f" {len(done)} trials are few: read it as a hint."
        note = Markup('<p class="muted">{}</p>').format(text)
    charts += [_by_key(sweep, key, done) for key in varied]
    if len(varied) > 1:
        coordinates = optuna.visualization.plot_parallel_coordinate(
            study, params=varied, target_name=sweep.metric
        )
        charts.append(draw(coordinates, "All keys at once"))
    return Markup("<h2>What mattered</h2>{}{}").format(note, grid(charts))


def _history(study: optuna.Study, sweep: Sweep, done: list[FrozenTrial]) -> Markup:
    numbers = [trial.number + 1 for trial in done]
    values = [float(trial.value or 0) for trial in done]
    accumulate = np.minimum.accumulate if _is_minimized(study) else np.maximum.accumulate
    lines = [
        go.Scatter(x=numbers, y=values, mode="markers", name="trial"),
        go.Scatter(x=numbers, y=accumulate(values), name="best so far"),
    ]
    return draw(go.Figure(lines), f"{sweep.metric}, trial by trial", xaxis_title="trial")


def _by_key(sweep: Sweep, key: str, done: list[FrozenTrial]) -> Markup:
    options = sweep.parameters[key]
    axis: dict[str, Any] = {"title": key}
    if not isinstance(options, Range):
        axis["type"] = "category"
    elif options.log:
        axis["type"] = "log"
    dots = go.Scatter(
        x=[trial.params[key] for trial in done],
        y=[trial.value for trial in done],
        text=[f"trial {trial.number + 1}" for trial in done],
        mode="markers",
    )
    return draw(go.Figure(dots), f"{sweep.metric} by {key}", xaxis=axis)


def importance(study: optuna.Study, keys: list[str]) -> dict[str, float]:
    """Return the importance of each key, as shares: how it tells the better half of the trials from
    all (PED-ANOVA; Watanabe et al. 2023).

    It is empty where Optuna cannot tell, for example where all trials are equally good.
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


def _bars(importances: dict[str, float]) -> Markup:
    names = list(reversed(importances))
    bars = go.Bar(x=[importances[name] for name in names], y=names, orientation="h")
    return draw(go.Figure(bars), "Importance of keys")


def _curves(study: optuna.Study, directory: Path) -> Markup:
    train: dict[str, tuple[list, list]] = {}
    evaluations: dict[str, tuple[list, list]] = {}
    for trial in study.get_trials(deepcopy=False):
        rows = [row for row in _rows(trial, directory) if row.get("loss") is not None]
        for split, lines in (("train", train), ("eval", evaluations)):
            of_split = [row for row in rows if row["split"] == split]
            if of_split:
                steps = [row["step"] for row in of_split]
                lines[f"trial {trial.number + 1}"] = steps, [row["loss"] for row in of_split]
    if not train:
        return Markup("")
    charts = [curve("Training loss", train), curve("Evaluation loss", evaluations)]
    return Markup("<h2>Curves</h2>{}").format(grid(charts))


def _is_minimized(study: optuna.Study) -> bool:
    return study.direction == optuna.study.StudyDirection.MINIMIZE


def _rows(trial: FrozenTrial, directory: Path) -> list[dict[str, Any]]:
    rows = objects(read_metrics(trial_directory(directory, trial.number)))
    return [row for row in rows if "split" in row and "step" in row]


def _link(trial: FrozenTrial, directory: Path) -> str:
    name = f"trial {trial.number + 1}"
    page = trial_directory(directory, trial.number) / REPORT
    link = Markup('<a href="{}">{}</a>').format(page.relative_to(directory), name)
    return link if page.exists() else name
