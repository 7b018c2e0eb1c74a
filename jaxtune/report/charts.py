"""The report's charts, as HTML for a page that includes plotly's script."""

from itertools import pairwise
from typing import Any

_LAYOUT = {
    "height": 320,
    "margin": {"l": 55, "r": 15, "t": 45, "b": 60},
    "template": "plotly_white",
    "legend": {"orientation": "h", "y": -0.3},
}


def curve(title: str, series: dict[str, tuple[list, list]]) -> str:
    """Draw lines over optimizer steps.

    Args:
        title: the quantity and its unit.
        series: steps and values by name.

    """
    import plotly.graph_objects as go

    lines = []
    for name, (steps, values) in series.items():
        mode = "lines+markers" if len(steps) < 60 else "lines"
        lines.append(go.Scatter(x=steps, y=values, name=name, mode=mode))
    return draw(go.Figure(lines), title, xaxis_title="step")


def histogram(title: str, series: dict[str, dict[str, list[int]]]) -> str:
    """Draw overlaid histograms, each given as edges and the counts between them."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, bins in series.items():
        edges = bins["edges"]
        widths = [right - left for left, right in pairwise(edges)]
        figure.add_bar(
            x=edges[:-1], y=bins["counts"], width=widths, offset=0, name=name, opacity=0.7
        )
    figure.update_layout(barmode="overlay")
    return draw(figure, title, xaxis_title="tokens")


def confusion(title: str, table: dict[str, Any]) -> str:
    """Draw a confusion matrix: true classes in rows, predicted ones in columns."""
    import plotly.graph_objects as go

    names, counts = table["classes"], table["rows_true_columns_predicted"]
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


def draw(figure: Any, title: str, **layout: Any) -> str:
    """Return the HTML of a plotly figure."""
    figure.update_layout(title=title, **(_LAYOUT | layout))
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
