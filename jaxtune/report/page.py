"""`report.html`: one file that opens without a network, drawn from what run directories hold."""

import html
import json
from pathlib import Path
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json, read_jsonl, write_text
from jaxtune.report.charts import confusion, curve, histogram
from jaxtune.train.metrics import read_metrics
from jaxtune.train.rundir import CONFIG, DATA_SUMMARY, ENVIRONMENT, SAMPLES, VERIFICATION

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; padding-bottom: .3rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } td.number { font-variant-numeric: tabular-nums; text-align: right }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: .5rem }
.grid > div { min-width: 0; overflow: hidden }
pre { background: #f6f8fa; padding: .8rem; overflow: auto; white-space: pre-wrap; font-size: 13px } .muted { color: #656d76 }
"""

_METRICS = ("loss", "perplexity", "accuracy", "accuracy_greedy", "macro_f1", "margin", "teacher_kl")
_FURTHER = {
    "margin": "Margin of the preferred answer",
    "accuracy": "Share of pairs in the right order",
    "teacher_kl": "Distance to the teacher, nats",
}


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
    rows = read_metrics(run)
    if not rows:
        raise UserError(f"{run} has no metrics yet. Train first: jaxtune train {run}/{CONFIG}")
    optional = {name: run / file for name, file in (("env", ENVIRONMENT), ("data", DATA_SUMMARY), ("verification", VERIFICATION))}
    samples = run / SAMPLES
    return {
        "name": str(run),
        "train": [row for row in rows if row["split"] == "train"],
        "eval": [row for row in rows if row["split"] == "eval"],
        "config": (run / CONFIG).read_text(encoding="utf-8"),
        "samples": read_jsonl(samples) if samples.exists() else [],
        **{name: read_json(path) if path.exists() else {} for name, path in optional.items()},
    }


def _page(runs: list[dict[str, Any]]) -> str:
    from plotly.offline import get_plotlyjs

    title = ", ".join(run["name"] for run in runs)
    body = [f"<h1>{html.escape(title)}</h1>", _curves(runs), *(_one(run, len(runs) > 1) for run in runs)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(body)}</body></html>\n"
    )


def _curves(runs: list[dict[str, Any]]) -> str:
    def series(split: str, key: str) -> dict[str, tuple[list, list]]:
        suffix = " (evaluation)" if split == "eval" else ""
        found = {
            run["name"] + suffix: [(row["step"], row[key]) for row in run[split] if row.get(key) is not None] for run in runs
        }
        return {name: ([x for x, _ in points], [y for _, y in points]) for name, points in found.items() if points}

    charts = [
        curve("Loss, nats per supervised token", series("train", "loss") | series("eval", "loss")),
        curve("Learning rate", series("train", "learning_rate")),
        curve("Gradient norm before clipping", series("train", "grad_norm")),
        curve("Tokens per second", series("train", "tokens_per_second")),
    ]
    charts += [curve(title, found | series("eval", name)) for name, title in _FURTHER.items() if (found := series("train", name))]
    return f'<h2>Training</h2><div class="grid">{"".join(charts)}</div>'


def _one(run: dict[str, Any], named: bool) -> str:
    parts = [f"<h1>{html.escape(run['name'])}</h1>"] if named else []
    parts += [_before_after(run["eval"]), _samples(run["samples"]), _data(run["data"]), _proof(run["verification"])]
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(run['config'])}</pre>")
    parts.append(f"<h2>Environment</h2><pre>{html.escape(json.dumps(run['env'], indent=2))}</pre>")
    return "".join(parts)


def _before_after(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if "task" in row]
    if not rows:
        return '<h2>Evaluation</h2><p class="muted">No evaluation data (data.eval).</p>'
    before, after = rows[0], rows[-1] if len(rows) > 1 else None
    lines = ["<tr><th></th><th>before</th><th>after</th><th>95% interval after</th></tr>"]
    for name in _METRICS:
        if name not in before:
            continue
        interval = (after or {}).get("intervals", {}).get(name)
        cells = [
            _number(before[name]),
            _number(after[name]) if after else "",
            f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "",
        ]
        lines.append(f"<tr><th>{name}</th>" + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>")
    tables = [
        confusion(label, row["confusion"]) for label, row in (("before", before), ("after", after)) if row and "confusion" in row
    ]
    grid = f'<div class="grid">{"".join(tables)}</div>' if tables else ""
    return f"<h2>Evaluation on {before['rows']} rows ({before['task']})</h2><table>{''.join(lines)}</table>{grid}"


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    blocks = []
    for sample in samples:
        prompt = "\n".join(f"[{message['role']}] {message['content']}" for message in sample["prompt"])
        during = [(f"after step {said['step']}", said["text"]) for said in sample.get("during", [])]
        rows = [("wanted", sample.get("wanted")), ("before", sample.get("before")), *during, ("after", sample.get("after"))]
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows if text is not None)
        blocks.append(f"<pre>{html.escape(prompt)}</pre><table>{cells}</table>")
    return "<h2>What the model says</h2>" + "".join(blocks)


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    names = [name for name in next(iter(data.values())) if name != "lengths"]
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_number(part[name]))}</td>" for name in names) + "</tr>" for part in data.values()
    )
    chart = histogram("Tokens per example", {name: part["lengths"] for name, part in data.items()})
    return f"<h2>Data</h2><table><tr>{head}</tr>{body}</table>{chart}"


def _proof(result: dict[str, Any]) -> str:
    if not result:
        return ""
    peft = result["torch_difference"]
    by_peft = (
        f"{peft:.1e} when loaded by PEFT" if peft is not None else f"not loaded by PEFT ({html.escape(result['torch_note'])})"
    )
    return (
        f"<h2>Export</h2><p>Over {result['tokens']} tokens of text, logits up to {result['largest_logit']:.1f}: the adapter on disk differs from the "
        f"trained model by {result['reload_difference']:.1e} when reloaded into a fresh base, {by_peft}.</p>"
    )


def _number(value: Any) -> str:
    if value is None:
        return "infinite"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
