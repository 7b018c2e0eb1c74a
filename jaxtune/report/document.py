"""The frame of a page: one file that opens without a network, with plotly's script in it; tables
and numbers.
"""

import html
from collections.abc import Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; padding-bottom: .3rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } td.number, th.number { font-variant-numeric: tabular-nums; text-align: right }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: .5rem }
.grid > div { min-width: 0; overflow: hidden }
pre { background: #f6f8fa; padding: .8rem; overflow: auto; white-space: pre-wrap; font-size: 13px }
.muted { color: #656d76 } .scroll { overflow-x: auto }
"""


class Cell(str):
    """A piece of HTML that stands in a table as it is."""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page."""
    from plotly.offline import get_plotlyjs

    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(body)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose rows begin with their names; numbers stand on the right."""
    top = (
        f"<tr><th>{html.escape(head[0])}</th>"
        + "".join(f'<th class="number">{html.escape(name)}</th>' for name in head[1:])
        + "</tr>"
    )
    lines = (
        f"<tr><th>{_shown(row[0])}</th>" + "".join(_cell(value) for value in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>{top}{"".join(lines)}</table></div>'


def grid(charts: Sequence[str]) -> str:
    """Charts beside each other where there is room."""
    return f'<div class="grid">{"".join(charts)}</div>'


def number(value: Any) -> str:
    """A number in few digits."""
    if value is None:
        return "infinite"
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def ends(interval: Sequence[float] | None) -> str:
    """An interval, or nothing."""
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def _cell(value: Any) -> str:
    return f'<td class="number">{_shown(value)}</td>'


def _shown(value: Any) -> str:
    return (
        value
        if isinstance(value, Cell)
        else html.escape(value if isinstance(value, str) else number(value))
    )
