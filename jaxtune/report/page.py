"""`report.html`: one file about run directories that opens without a network."""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtune.config.keys import flatten
from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json, read_jsonl, write_text
from jaxtune.report.charts import confusion, curve, histogram
from jaxtune.report.document import document, grid, interval_text, number_text, table
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
        UserError: a directory that is not a run, or has no metrics yet.

    """
    write_text(out, _page([_read(run) for run in runs]))
    return out


def _read(run: Path) -> RunRecord:
    if not (run / CONFIG).exists():
        raise UserError(f"{run} is not a run directory: it has no {CONFIG}.")
    check_layout(run)
    rows = read_metrics(run)
    if not rows:
        raise UserError(f"{run} has no metrics yet. Train first: jaxtune train {run}/{CONFIG}")

    def read_object(name: str) -> dict[str, Any]:
        return read_json(run / name) if (run / name).exists() else {}

    def read_rows(name: str) -> list[dict[str, Any]]:
        return read_jsonl(run / name) if (run / name).exists() else []

    return RunRecord(
        name=str(run),
        train=[row for row in rows if row["split"] == "train"],
        eval=[row for row in rows if row["split"] == "eval"],
        config=(run / CONFIG).read_text(encoding="utf-8"),
        environment=read_object(ENVIRONMENT),
        data=read_object(DATA_SUMMARY),
        verification=read_object(VERIFICATION),
        samples=read_rows(SAMPLES),
        predictions=read_rows(PREDICTIONS),
    )


def _page(runs: list[RunRecord]) -> str:
    title = ", ".join(run.name for run in runs)
    body = [f"<h1>{html.escape(title)}</h1>"]
    if len(runs) > 1:
        body += [_comparison(runs), _config_differences(runs)]
    body += [_curves(runs), *(_run_section(run, titled=len(runs) > 1) for run in runs)]
    return document(title, body)


def _comparison(runs: list[RunRecord]) -> str:
    """Return a table of the last full evaluation of each run, with intervals."""
    last = {run.name: rows[-1] for run in runs if (rows := run.full_evaluations)}
    if not last:
        return ""
    names = list(dict.fromkeys(name for row in last.values() for name in metric_names(row)))
    lines = [[name, *(_with_interval(row, name) for row in last.values())] for name in names]
    return f"<h2>Compared</h2>{table(['', *last], lines)}"


def _with_interval(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    bounds = interval_text(row.get("intervals", {}).get(name))
    return number_text(row[name]) + (f" ({bounds})" if bounds else "")


def _config_differences(runs: list[RunRecord]) -> str:
    """Return a table of the keys in which the runs' configurations differ."""
    configs = [flatten(read_config(Path(run.name)).model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = [
        key
        for key in keys
        if key != "run.dir" and any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    if not differing:
        return "<h2>Configurations</h2><p>All keys are the same.</p>"
    lines = [[key, *(json.dumps(config.get(key)) for config in configs)] for key in differing]
    head = ["", *(run.name for run in runs)]
    return f"<h2>Differences between the configurations</h2>{table(head, lines)}"


def _curves(runs: list[RunRecord]) -> str:
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
    return f"<h2>Training</h2>{grid(charts)}"


def _run_section(run: RunRecord, *, titled: bool) -> str:
    parts = [f"<h1>{html.escape(run.name)}</h1>"] if titled else []
    environment = json.dumps(run.environment, indent=2)
    parts += [
        _before_after(run.full_evaluations),
        _mistakes(run.predictions),
        _samples(run.samples),
        _data(run.data),
        _verification(run.verification),
        f"<h2>Configuration</h2><pre>{html.escape(run.config)}</pre>",
        f"<h2>Environment</h2><pre>{html.escape(environment)}</pre>",
    ]
    return "".join(parts)


def _before_after(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return '<h2>Evaluation</h2><p class="muted">No evaluation data (data.eval).</p>'
    before, after = rows[0], rows[-1] if len(rows) > 1 else {}
    lines = []
    for name in metric_names(before):
        interval = interval_text(after.get("intervals", {}).get(name)) if name in after else ""
        lines.append([name, before[name], after.get(name, ""), interval])
    matrices = [
        confusion(label, row["confusion"])
        for label, row in (("before", before), ("after", after))
        if "confusion" in row
    ]
    heading = f"<h2>Evaluation on {before['rows']} rows ({html.escape(before['task'])})</h2>"
    metrics = table(["", "before", "after", "95% interval after"], lines)
    return heading + metrics + (grid(matrices) if matrices else "")


def _mistakes(predictions: list[dict[str, Any]]) -> str:
    """Return the first rows whose answer differs from the expected one."""
    wrong = [row for row in predictions if row.get("chosen", row.get("said")) != row["wanted"]]
    if not wrong:
        return ""
    heading = f"<h2>Wrong answers: the first of {len(wrong):,} of {len(predictions):,} rows</h2>"
    names = {"wanted": "expected", "chosen": "most likely", "said": "generated"}
    blocks = (
        _prompt(row["prompt"]) + _answers([(title, row.get(key)) for key, title in names.items()])
        for row in wrong[:_MISTAKES]
    )
    return heading + "".join(blocks)


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    blocks = []
    for sample in samples:
        during = [(f"after step {row['step']}", row["text"]) for row in sample.get("during", [])]
        answers = [
            ("expected", sample.get("wanted")),
            ("before", sample.get("before")),
            *during,
            ("after", sample.get("after")),
        ]
        blocks.append(_prompt(sample["prompt"]) + _answers(answers))
    return "<h2>Samples of the model's answers</h2>" + "".join(blocks)


def _answers(answers: list[tuple[str, str | None]]) -> str:
    cells = (
        f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>"
        for name, text in answers
        if text is not None
    )
    return f"<table>{''.join(cells)}</table>"


def _prompt(messages: list[dict[str, Any]]) -> str:
    lines = (f"[{message['role']}] {message['content']}" for message in messages)
    return "<pre>" + html.escape("\n".join(lines)) + "</pre>"


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    names = [name for name in next(iter(data.values())) if name != "lengths"]
    rows = [[which, *(part[name] for name in names)] for which, part in data.items()]
    chart = histogram("Tokens per example", {name: part["lengths"] for name, part in data.items()})
    head = ["", *(name.replace("_", " ") for name in names)]
    return f"<h2>Data</h2>{table(head, rows)}{chart}"


def _verification(result: dict[str, Any]) -> str:
    if not result:
        return ""
    difference = result["torch_difference"]
    by_peft = (
        f"{difference:.1e} when loaded by PEFT"
        if difference is not None
        else f"not loaded by PEFT ({html.escape(result['torch_note'])})"
    )
    return (
        f"<h2>Export</h2><p>Over {result['tokens']} tokens of text, with logits up to "
        f"{result['largest_logit']:.1f}, the adapter on disk differs from the trained model by "
        f"{result['reload_difference']:.1e} when reloaded into a fresh base, {by_peft}.</p>"
    )
