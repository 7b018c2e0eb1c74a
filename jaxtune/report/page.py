"""`report.html`: one file that opens without a network, drawn from what run directories hold."""

import html
import json
from pathlib import Path
from typing import Any

from jaxtune.config.keys import flatten
from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json, read_jsonl, write_text
from jaxtune.report.charts import confusion, curve, histogram
from jaxtune.report.document import document, ends, grid, number, table
from jaxtune.tracking.metrics_log import (
    AFTER,
    BEFORE,
    DURING,
    metric_names,
    phase_of,
    read_metrics,
)
from jaxtune.tracking.run_directory import (
    CONFIG,
    DATA_SUMMARY,
    ENVIRONMENT,
    PREDICTIONS,
    SAMPLES,
    VERIFICATION,
    check_layout,
    read_config,
)

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


def write_report(runs: list[Path], out: Path) -> Path:
    """Write the report of one run or several to `out`.

    Raises:
        UserError: a directory that is not a run, or has no metrics yet.

    """
    write_text(out, _page([_read(run) for run in runs]))
    return out


def _read(run: Path) -> dict[str, Any]:
    if not (run / CONFIG).exists():
        raise UserError(f"{run} is not a run directory: it has no {CONFIG}.")
    check_layout(run)
    rows = read_metrics(run)
    if not rows:
        raise UserError(f"{run} has no metrics yet. Train first: jaxtune train {run}/{CONFIG}")
    optional = {
        name: run / file
        for name, file in (
            ("env", ENVIRONMENT),
            ("data", DATA_SUMMARY),
            ("verification", VERIFICATION),
        )
    }
    lists = {
        name: run / file for name, file in (("samples", SAMPLES), ("predictions", PREDICTIONS))
    }
    return {
        "name": str(run),
        "train": [row for row in rows if row["split"] == "train"],
        "eval": [row for row in rows if row["split"] == "eval"],
        "config": (run / CONFIG).read_text(encoding="utf-8"),
        **{name: read_json(path) if path.exists() else {} for name, path in optional.items()},
        **{name: read_jsonl(path) if path.exists() else [] for name, path in lists.items()},
    }


def _page(runs: list[dict[str, Any]]) -> str:
    title, several = ", ".join(run["name"] for run in runs), len(runs) > 1
    body = [
        f"<h1>{html.escape(title)}</h1>",
        *([_compared(runs), _differing(runs)] if several else []),
        _curves(runs),
    ]
    return document(title, [*body, *(_one(run, several) for run in runs)])


def _compared(runs: list[dict[str, Any]]) -> str:
    """The last evaluation of each run, with intervals."""
    last = {run["name"]: rows[-1] for run in runs if (rows := _measured(run))}
    if not last:
        return ""
    names = list(dict.fromkeys(name for row in last.values() for name in metric_names(row)))
    lines = [[name, *(_with_interval(row, name) for row in last.values())] for name in names]
    return f"<h2>Compared</h2>{table(['', *last], lines)}"


def _with_interval(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    bounds = ends(row.get("intervals", {}).get(name))
    return number(row[name]) + (f" ({bounds})" if bounds else "")


def _differing(runs: list[dict[str, Any]]) -> str:
    """The keys in which the runs' configurations are not the same."""
    flat = [flatten(read_config(Path(run["name"])).model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differing = [
        key
        for key in keys
        if key != "run.dir" and any(one.get(key) != flat[0].get(key) for one in flat)
    ]
    if not differing:
        return "<h2>Configurations</h2><p>All keys are the same.</p>"
    lines = [[key, *(json.dumps(one.get(key)) for one in flat)] for key in differing]
    return f"<h2>What differs in the configurations</h2>{table(['', *(run['name'] for run in runs)], lines)}"


def _curves(runs: list[dict[str, Any]]) -> str:
    def series(split: str, key: str) -> dict[str, tuple[list, list]]:
        suffix = " (evaluation)" if split == "eval" else ""
        found = {
            run["name"] + suffix: [
                (row["step"], row[key]) for row in run[split] if row.get(key) is not None
            ]
            for run in runs
        }
        return {
            name: ([x for x, _ in points], [y for _, y in points])
            for name, points in found.items()
            if points
        }

    on_the_way = [row for run in runs for row in run["eval"] if phase_of(row) == DURING]
    evaluated = [
        name
        for name in dict.fromkeys(name for row in on_the_way for name in metric_names(row))
        if name != "perplexity"
    ]
    trained = [*_ALWAYS, *(name for name in _IN_TRAINING if series("train", name))]
    charts = []
    for name in dict.fromkeys([*trained, *evaluated]):
        lines = (series("train", name) if name in trained else {}) | (
            series("eval", name) if name in ("loss", *evaluated) else {}
        )
        charts.append(curve(_TITLES.get(name, name), lines))
    return f"<h2>Training</h2>{grid(charts)}"


def _one(run: dict[str, Any], named: bool) -> str:
    parts = [f"<h1>{html.escape(run['name'])}</h1>"] if named else []
    parts += [
        _before_after(_measured(run)),
        _mistakes(run["predictions"]),
        _samples(run["samples"]),
        _data(run["data"]),
    ]
    parts.append(_proof(run["verification"]))
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(run['config'])}</pre>")
    parts.append(f"<h2>Environment</h2><pre>{html.escape(json.dumps(run['env'], indent=2))}</pre>")
    return "".join(parts)


def _measured(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations before and after training."""
    return [row for row in run["eval"] if phase_of(row) in (BEFORE, AFTER)]


def _before_after(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return '<h2>Evaluation</h2><p class="muted">No evaluation data (data.eval).</p>'
    before, after = rows[0], rows[-1] if len(rows) > 1 else None
    lines = []
    for name in metric_names(before):
        afterwards = (
            [after[name], ends(after.get("intervals", {}).get(name))]
            if after and name in after
            else ["", ""]
        )
        lines.append([name, before[name], *afterwards])
    tables = [
        confusion(label, row["confusion"])
        for label, row in (("before", before), ("after", after))
        if row and "confusion" in row
    ]
    heading = f"<h2>Evaluation on {before['rows']} rows ({html.escape(before['task'])})</h2>"
    return (
        heading
        + table(["", "before", "after", "95% interval after"], lines)
        + (grid(tables) if tables else "")
    )


def _mistakes(predictions: list[dict[str, Any]]) -> str:
    """The first rows where the answer was not the one wanted."""
    wrong = [row for row in predictions if row.get("chosen", row.get("said")) != row["wanted"]]
    if not wrong:
        return ""
    blocks = []
    for row in wrong[:_MISTAKES]:
        blocks.append(
            _prompt(row["prompt"])
            + _answers([(name, row.get(name)) for name in ("wanted", "chosen", "said")])
        )
    return f"<h2>Where it is not what was wanted: {len(wrong):,} of {len(predictions):,} rows, the first of them</h2>{''.join(blocks)}"


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    blocks = []
    for sample in samples:
        during = [(f"after step {said['step']}", said["text"]) for said in sample.get("during", [])]
        rows = [
            ("wanted", sample.get("wanted")),
            ("before", sample.get("before")),
            *during,
            ("after", sample.get("after")),
        ]
        blocks.append(_prompt(sample["prompt"]) + _answers(rows))
    return "<h2>What the model says</h2>" + "".join(blocks)


def _answers(answers: list[tuple[str, str | None]]) -> str:
    cells = (
        f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>"
        for name, text in answers
        if text is not None
    )
    return f"<table>{''.join(cells)}</table>"


def _prompt(messages: list[dict[str, Any]]) -> str:
    return (
        "<pre>"
        + html.escape(
            "\n".join(f"[{message['role']}] {message['content']}" for message in messages)
        )
        + "</pre>"
    )


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    names = [name for name in next(iter(data.values())) if name != "lengths"]
    rows = [[which, *(part[name] for name in names)] for which, part in data.items()]
    chart = histogram("Tokens per example", {name: part["lengths"] for name, part in data.items()})
    return f"<h2>Data</h2>{table(['', *(name.replace('_', ' ') for name in names)], rows)}{chart}"


def _proof(result: dict[str, Any]) -> str:
    if not result:
        return ""
    peft = result["torch_difference"]
    by_peft = (
        f"{peft:.1e} when loaded by PEFT"
        if peft is not None
        else f"not loaded by PEFT ({html.escape(result['torch_note'])})"
    )
    return (
        f"<h2>Export</h2><p>Over {result['tokens']} tokens of text, logits up to "
        f"{result['largest_logit']:.1f}: the adapter on disk differs from the "
        f"trained model by {result['reload_difference']:.1e} when reloaded into a fresh base, "
        f"{by_peft}.</p>"
    )
