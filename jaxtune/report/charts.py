"""The report's charts: each an empty element and its figure as JSON, which the page's script draws.

Plotly reads tags in texts; names, titles and labels are data, so all texts are escaped for it.
"""

import html
import json
from itertools import pairwise
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from jaxtune.report.fields import as_list, as_number, as_object

_LAYOUT = {
    "height": 320,
    "margin": {"l": 55, "r": 15, "t": 45, "b": 60},
    "template": "plotly_white",
    "legend": {"orientation": "h", "y": -0.3},
}


def curve(title: str, series: dict[str, tuple[list, list]]) -> Markup:
    """Draw lines over optimizer steps.

    Args:
        title: the quantity and its unit.
        series: steps and values by name; those that are no numbers are gaps.

    """
    import plotly.graph_objects as go

    lines = []
    for name, (steps, values) in series.items():
        mode = "lines+markers" if len(steps) < 60 else "lines"
        x, y = ([as_number(value) for value in column] for column in (steps, values))
        lines.append(go.Scatter(x=x, y=y, name=name, mode=mode))
    return draw(go.Figure(lines), title, xaxis_title="step")


def histogram(title: str, series: dict[str, Any]) -> Markup:
    """Draw overlaid histograms, each given as `edges` and the `counts` between them."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, bins in series.items():
        edges, counts = (
            [as_number(value) or 0.0 for value in as_list(as_object(bins).get(key))]
            for key in ("edges", "counts")
        )
        widths = [max(right - left, 0.0) for left, right in pairwise(edges)]
        figure.add_bar(x=edges[:-1], y=counts, width=widths, offset=0, name=name, opacity=0.7)
    figure.update_layout(barmode="overlay")
    return draw(figure, title, xaxis_title="tokens")


def confusion(title: str, table: Any) -> Markup:
    """Draw a confusion matrix: true classes in rows, predicted ones in columns."""
    import plotly.graph_objects as go

    fields = as_object(table)
    names = [str(name) for name in as_list(fields.get("classes"))]
    rows = as_list(fields.get("rows_true_columns_predicted"))
    counts = [[as_number(count) for count in as_list(row)] for row in rows]
    heat = go.Heatmap(
        z=counts,
        x=names,
        y=names,
        text=counts,
        texttemplate="%{text}",
        colorscale="Blues",
        showscale=False,
    )
    figure = go.Figure(heat)
    figure.update_yaxes(autorange="reversed", title="true")
    return draw(figure, f"Confusion, {title}", xaxis_title="predicted")


def draw(figure: Any, title: str, **layout: Any) -> Markup:
    """Return a plotly figure for a page of `document`."""
    figure.update_layout(title=title, **(_LAYOUT | layout))
    shown = _escaped(json.loads(figure.to_json(engine="json")))
    return Markup(
        '<div><div class="plotly-graph-div"></div><script type="application/json">{}</script></div>'
    ).format(htmlsafe_json_dumps(shown))


def _escaped(value: Any) -> Any:
    """Return a figure whose texts plotly shows as they are."""
    if isinstance(value, str):
        return html.escape(value, quote=False)
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value
