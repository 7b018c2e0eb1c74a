"""A page in one file that opens without a network, with plotly's script in it; its tables.

All that a page shows is data of whoever wrote the run directory. HTML is `Markup`, which escapes
whatever is put into it, and a policy in the page's head lets only its own scripts run.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem }
h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee4;
  padding-bottom: .3rem }
table { border-collapse: collapse }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 }
td.number, th.number { font-variant-numeric: tabular-nums; text-align: right }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: .5rem }
.grid > div { min-width: 0; overflow: hidden }
pre { background: #f6f8fa; padding: .8rem; overflow: auto; white-space: pre-wrap; font-size: 13px }
.muted { color: #656d76 } .scroll { overflow-x: auto }
"""
# The figures are JSON, which is no script: what draws them is the same for every page.
_DRAW = """
for (const data of document.querySelectorAll("script[type='application/json']")) {
  const figure = JSON.parse(data.textContent);
  const options = {displayModeBar: false, responsive: true};
  Plotly.newPlot(data.previousElementSibling, figure.data, figure.layout, options);
}
"""
_PAGE = Markup(
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="{policy}">'
    "<title>{title}</title><style>{style}</style>"
    "<script>{plotly}</script></head><body>{body}<script>{draw}</script></body></html>\n"
)


def document(title: str, body: Iterable[str], *, evaluates: bool = False) -> str:
    """Return a complete page.

    Args:
        title: its title.
        body: its parts; what is no `Markup` is escaped.
        evaluates: whether a chart compiles programs for the graphics card as it is drawn, as
            parallel coordinates do.

    """
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    page = _PAGE.format(
        policy=_policy([plotly, _DRAW], evaluates),
        title=title,
        style=Markup(_STYLE),
        plotly=Markup(plotly),
        body=Markup("").join(body),
        draw=Markup(_DRAW),
    )
    return page.encode("utf-8", "backslashreplace").decode()  # halves of a surrogate pair


def _policy(scripts: Sequence[str], evaluates: bool) -> str:
    """Return what a browser may do with the page: run these scripts, and fetch nothing.

    Plotly sets styles as it draws, so those have no hashes; without a network they do no harm.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    sources = " ".join([*hashes, *(["'unsafe-eval'"] if evaluates else [])])
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Markup:
    """Return a table whose rows begin with their names; the other cells are aligned right."""
    number = Markup('<th class="number">{}</th>')
    names = Markup("").join(number.format(_cell(name)) for name in head[1:])
    lines = [Markup("<tr><th>{}</th>{}</tr>").format(_cell(head[0]), names)]
    for row in rows:
        cells = (Markup('<td class="number">{}</td>').format(_cell(value)) for value in row[1:])
        line = Markup("<tr><th>{}</th>{}</tr>")
        lines.append(line.format(_cell(row[0]), Markup("").join(cells)))
    return Markup('<div class="scroll"><table>{}</table></div>').format(Markup("").join(lines))


def grid(charts: Iterable[str]) -> Markup:
    """Place charts beside each other where there is room."""
    return Markup('<div class="grid">{}</div>').format(Markup("").join(charts))


def number_text(value: Any) -> str:
    """Return a number in few digits; None stands for infinity, which JSON does not have."""
    if value is None:
        return "infinite"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def interval_text(interval: Any) -> str:
    """Return the ends of an interval, or an empty text where there is none."""
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        return ""
    return " to ".join(number_text(float(end) if isinstance(end, int) else end) for end in interval)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else number_text(value)
