"""`report.html`: one file about run directories that opens without a network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from jaxtune.config.keys import flatten
from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import read_json, write_text
from jaxtune.core.text import without_credentials
from jaxtune.report.charts import confusion, curve, histogram
from jaxtune.report.document import document, grid, interval_text, number_text, table
from jaxtune.report.fields import as_object, objects, scientific
from jaxtune.tracking.metrics_log import (
    AFTER,
    BEFORE,
    DURING,
    metric_names,
    phase_of,
    read_metrics,
)
from jaxtune.tracking.ownership import (
    CONFIG,
    DATA_SUMMARY,
    ENVIRONMENT,
    PREDICTIONS,
    SAMPLES,
    VERIFICATION,
)
from jaxtune.tracking.record import check_layout, read_config

_TITLES = {
    "loss": "Loss, nats per supervised token",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens per second",
    "margin": "Margin of the preferred answer",
    "teacher_kl": "Distance to the teacher, nats",
}
_ALWAYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
_IN_TRAINING = ("margin", "accuracy", "teacher_kl")
_MISTAKES = 8


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds.

    Attributes:
        name: the directory.
        train, eval: the rows of its metrics by split.
        config: the text of its configuration.
        environment, data, verification: its JSON files; empty where one is missing.
        samples, predictions: the rows of its JSON Lines files.

    """

    name: str
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    config: str
    environment: dict[str, Any]
    data: dict[str, Any]
    verification: dict[str, Any]
    samples: list[dict[str, Any]]
    predictions: list[dict[str, Any]]

    @property
    def full_evaluations(self) -> list[dict[str, Any]]:
        """Return the evaluations before and after training."""
        return [row for row in self.eval if phase_of(row) in (BEFORE, AFTER)]


def write_report(runs: list[Path], out: Path) -> Path:
    """Write the report of one or several runs to `out`.

    Raises:
        UserError: a directory that is not a run, has no metrics yet, or a damaged file.

    """
    try:
        page = _page([_read(run) for run in runs])
    except RecursionError:
        names = listed(str(run) for run in runs)
        raise UserError(f"{names}: a JSON file there is nested too deeply to be shown.") from None
    write_text(out, page)
    return out


def _read(run: Path) -> RunRecord:
    if not (run / CONFIG).exists():
        raise UserError(f"{run} is not a run directory: it has no {CONFIG}.")
    check_layout(run)
    rows = [row for row in objects(read_metrics(run)) if "split" in row and "step" in row]
    if not rows:
        raise UserError(f"{run} has no metrics yet. Train first: jaxtune train {run}/{CONFIG}")

    def read_object(name: str) -> dict[str, Any]:
        return as_object(read_json(run / name)) if (run / name).exists() else {}

    return RunRecord(
        name=str(run),
        train=[row for row in rows if row["split"] == "train"],
        eval=[row for row in rows if row["split"] == "eval"],
        config=_read_text(run / CONFIG),
        environment=read_object(ENVIRONMENT),
        data=read_object(DATA_SUMMARY),
        verification=read_object(VERIFICATION),
        samples=_read_rows(run / SAMPLES),
        predictions=_read_rows(run / PREDICTIONS),
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file; none where it is missing.

    Raises:
        UserError: a line is not JSON.

    """
    rows: list[Any] = []
    for number, line in enumerate(_read_text(path).split("\n") if path.exists() else [], 1):
        try:
            rows += [json.loads(line)] if line else []
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number}: not valid JSON. Remove the line.") from None
    return objects(rows)


def _page(runs: list[RunRecord]) -> str:
    title = ", ".join(run.name for run in runs)
    body = [Markup("<h1>{}</h1>").format(title)]
    if len(runs) > 1:
        body += [_comparison(runs), _config_differences(runs)]
    body += [_curves(runs), *(_run_section(run, titled=len(runs) > 1) for run in runs)]
    return document(title, body)


def _section(heading: str, *parts: str) -> Markup:
    """Return parts under a heading; what is no `Markup` is escaped."""
    return Markup("<h2>{}</h2>{}").format(heading, Markup("").join(parts))


def _preformatted(text: str) -> Markup:
    return Markup("<pre>{}</pre>").format(text)


def _comparison(runs: list[RunRecord]) -> Markup:
    """Return a table of the last full evaluation of each run, with intervals."""
    last = {run.name: rows[-1] for run in runs if (rows := run.full_evaluations)}
    if not last:
        return Markup("")
    names = list(dict.fromkeys(name for row in last.values() for name in metric_names(row)))
    lines = [[name, *(_with_interval(row, name) for row in last.values())] for name in names]
    return _section("Compared", table(["", *last], lines))


def _with_interval(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    bounds = interval_text(as_object(row.get("intervals")).get(name))
    return number_text(row[name]) + (f" ({bounds})" if bounds else "")


def _config_differences(runs: list[RunRecord]) -> Markup:
    """Return a table of the keys in which the runs' configurations differ."""
    configs = [flatten(read_config(Path(run.name)).model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = [
        key
        for key in keys
        if key != "run.dir" and any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    if not differing:
        return _section("Configurations", Markup("<p>All keys are the same.</p>"))
    lines = [[key, *(_shown(config.get(key)) for config in configs)] for key in differing]
    head = ["", *(run.name for run in runs)]
    return _section("Differences between the configurations", table(head, lines))


def _shown(value: Any) -> str:
    return without_credentials(json.dumps(value))


def _curves(runs: list[RunRecord]) -> Markup:
    def series(split: Literal["train", "eval"], key: str) -> dict[str, tuple[list, list]]:
        suffix = " (evaluation)" if split == "eval" else ""
        lines = {}
        for run in runs:
            rows = [row for row in getattr(run, split) if row.get(key) is not None]
            if rows:
                lines[run.name + suffix] = [row["step"] for row in rows], [row[key] for row in rows]
        return lines

    during = [row for run in runs for row in run.eval if phase_of(row) == DURING]
    evaluated = dict.fromkeys(name for row in during for name in metric_names(row))
    evaluated.pop("perplexity", None)
    trained = [*_ALWAYS, *(name for name in _IN_TRAINING if series("train", name))]
    charts = []
    for name in dict.fromkeys([*trained, *evaluated]):
        lines = series("train", name) if name in trained else {}
        if name in ("loss", *evaluated):
            lines |= series("eval", name)
        charts.append(curve(_TITLES.get(name, name), lines))
    return _section("Training", grid(charts))


def _run_section(run: RunRecord, *, titled: bool) -> Markup:
    parts = [Markup("<h1>{}</h1>").format(run.name)] if titled else []
    environment = json.dumps(run.environment, indent=2)
    parts += [
        _before_after(run.full_evaluations),
        _mistakes(run.predictions),
        _samples(run.samples),
        _data(run.data),
        _verification(run.verification),
        _section("Configuration", _preformatted(without_credentials(run.config))),
        _section("Environment", _preformatted(without_credentials(environment))),
    ]
    return Markup("").join(parts)


def _before_after(rows: list[dict[str, Any]]) -> Markup:
    if not rows:
        nothing = Markup('<p class="muted">No evaluation data (data.eval).</p>')
        return _section("Evaluation", nothing)
    before, after = rows[0], rows[-1] if len(rows) > 1 else {}
    intervals = as_object(after.get("intervals"))
    lines = []
    for name in metric_names(before):
        interval = interval_text(intervals.get(name)) if name in after else ""
        lines.append([name, before[name], after.get(name, ""), interval])
    matrices = [
        confusion(label, row["confusion"])
        for label, row in (("before", before), ("after", after))
        if "confusion" in row
    ]
    heading = f"Evaluation on {before.get('rows')} rows ({before.get('task')})"
    metrics = table(["", "before", "after", "95% interval after"], lines)
    return _section(heading, metrics, *([grid(matrices)] if matrices else []))


def _mistakes(predictions: list[dict[str, Any]]) -> Markup:
    """Return the first rows whose answer differs from the expected one."""
    wrong = [row for row in predictions if row.get("chosen", row.get("said")) != row.get("wanted")]
    if not wrong:
        return Markup("")
    heading = f"Wrong answers: the first of {len(wrong):,} of {len(predictions):,} rows"
    names = {"wanted": "expected", "chosen": "most likely", "said": "generated"}
    blocks = (
        _prompt(row.get("prompt"))
        + _answers([(title, row.get(key)) for key, title in names.items()])
        for row in wrong[:_MISTAKES]
    )
    return _section(heading, *blocks)


def _samples(samples: list[dict[str, Any]]) -> Markup:
    if not samples:
        return Markup("")
    blocks = []
    for sample in samples:
        rows = objects(sample.get("during"))
        during = [(f"after step {row.get('step')}", row.get("text")) for row in rows]
        answers = [
            ("expected", sample.get("wanted")),
            ("before", sample.get("before")),
            *during,
            ("after", sample.get("after")),
        ]
        blocks.append(_prompt(sample.get("prompt")) + _answers(answers))
    return _section("Samples of the model's answers", *blocks)


def _answers(answers: list[tuple[str, Any]]) -> Markup:
    line = Markup("<tr><th>{}</th><td>{}</td></tr>")
    cells = (line.format(name, str(text)) for name, text in answers if text is not None)
    return Markup("<table>{}</table>").format(Markup("").join(cells))


def _prompt(messages: Any) -> Markup:
    lines = (f"[{message.get('role')}] {message.get('content')}" for message in objects(messages))
    return _preformatted("\n".join(lines))


def _data(data: dict[str, Any]) -> Markup:
    parts = {which: part for which, part in data.items() if isinstance(part, dict)}
    if not parts:
        return Markup("")
    names = [name for name in next(iter(parts.values())) if name != "lengths"]
    rows = [[which, *(part.get(name, "") for name in names)] for which, part in parts.items()]
    lengths = {name: part.get("lengths") for name, part in parts.items()}
    head = ["", *(name.replace("_", " ") for name in names)]
    return _section("Data", table(head, rows), histogram("Tokens per example", lengths))


def _verification(result: dict[str, Any]) -> Markup:
    if not result:
        return Markup("")
    difference = result.get("torch_difference")
    by_peft = (
        f"not loaded by PEFT ({result.get('torch_note')})"
        if difference is None
        else f"{scientific(difference)} when loaded by PEFT"
    )
    text = (
        f"Over {result.get('tokens')} tokens of text, with logits up to "
        f"{number_text(result.get('largest_logit'))}, the adapter on disk differs from the trained "
        f"model by {scientific(result.get('reload_difference'))} when reloaded into a fresh base, "
        f"{by_peft}."
    )
    return _section("Export", Markup("<p>{}</p>").format(text))
