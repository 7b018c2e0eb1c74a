"""The report's charts, as pieces of a page that holds plotly's script."""

from itertools import pairwise
from typing import Any

_LAYOUT = {
    "height": 320,
    "margin": {"l": 55, "r": 15, "t": 45, "b": 60},
    "template": "plotly_white",
    "legend": {"orientation": "h", "y": -0.3},
}


def curve(title: str, series: dict[str, tuple[list, list]]) -> str:
    """Lines over optimizer steps.

    Args:
        title: what is drawn and its unit.
        series: steps and values by name.

    """
    import plotly.graph_objects as go

    lines = [
        go.Scatter(
            x=steps, y=values, name=name, mode="lines+markers" if len(steps) < 60 else "lines"
        )
        for name, (steps, values) in series.items()
    ]
    return drawn(go.Figure(lines), title, xaxis_title="step")


def histogram(title: str, series: dict[str, dict[str, list[int]]]) -> str:
    """Overlaid histograms, each of edges and the counts between them."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, bins in series.items():
        edges = bins["edges"]
        widths = [right - left for left, right in pairwise(edges)]
        figure.add_bar(
            x=edges[:-1], y=bins["counts"], width=widths, offset=0, name=name, opacity=0.7
        )
    figure.update_layout(barmode="overlay")
    return drawn(figure, title, xaxis_title="tokens")


def confusion(title: str, table: dict[str, Any]) -> str:
    """A confusion matrix, rows true and columns predicted."""
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
    return drawn(figure, f"Confusion, {title}", xaxis_title="predicted")


def drawn(figure: Any, title: str, **layout: Any) -> str:
    """A figure of plotly's as a piece of a page."""
    figure.update_layout(title=title, **(_LAYOUT | layout))
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
