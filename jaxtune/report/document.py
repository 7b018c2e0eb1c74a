"""A page in one file that opens without a network, with plotly's script in it; its tables."""

import html
from collections.abc import Sequence
from typing import Any

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


class Cell(str):
    """HTML that a table shows unescaped."""


def document(title: str, body: Sequence[str]) -> str:
    """Return a complete page."""
    from plotly.offline import get_plotlyjs

    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(body)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table whose rows begin with their names; the other cells are aligned right."""
    names = "".join(f'<th class="number">{html.escape(name)}</th>' for name in head[1:])
    lines = [f"<tr><th>{html.escape(head[0])}</th>{names}</tr>"]
    for row in rows:
        cells = "".join(f'<td class="number">{_cell_html(value)}</td>' for value in row[1:])
        lines.append(f"<tr><th>{_cell_html(row[0])}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def grid(charts: Sequence[str]) -> str:
    """Place charts beside each other where there is room."""
    return f'<div class="grid">{"".join(charts)}</div>'


def number_text(value: Any) -> str:
    """Return a number in few digits; None stands for infinity, which JSON does not have."""
    if value is None:
        return "infinite"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def interval_text(interval: Sequence[float] | None) -> str:
    """Return the ends of an interval, or an empty text where there is none."""
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def _cell_html(value: Any) -> str:
    if isinstance(value, Cell):
        return value
    return html.escape(value if isinstance(value, str) else number_text(value))
