"""Throughput against latency: a line a cell, a point a concurrency, knee and most users marked."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from qgrid.report import load_table, numbers, rows
from qgrid.report.rows import Row

MOST_LINES = 16  # more cannot be told apart; the table has them all
_COLOURS = ["#1f5fa8", "#d1602b", "#2b8a57", "#8a3f8f", "#b3902a", "#3aa3b5", "#b3375e", "#5b6770"]
_DASHES = ("solid", "dash")
_LATENCIES = (("ttft_ms", "time to first token [ms]"), ("tpot_ms", "time per output token [ms]"))
_SIGNS = {load_table.KNEE: "diamond", load_table.MOST: "circle-open"}
_PLAIN = "circle"


def render(every: Sequence[Row], with_library: bool) -> str:
    """An HTML fragment, with plotly inside where the page has none yet; empty without a curve."""
    shown = [
        row for row in every if row.status == "ok" and len(_levels(row)) >= load_table.FEWEST_LEVELS
    ]
    if not shown:
        return ""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, row in enumerate(shown[:MOST_LINES]):
        for side, (metric, _) in enumerate(_LATENCIES):
            figure.add_trace(_trace(go, row, metric, side, number))
    figure.update_layout(**_layout(len(shown)))
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=with_library,
            div_id="loads",
            config={"displaylogo": False, "responsive": True, "displayModeBar": False},
        )
    )


def _levels(row: Row) -> list[str]:
    """Closed loops with a throughput, fewest users first."""
    return [part for part in rows.loads([row], "output_throughput") if rows.is_closed(part)]


def _trace(go: Any, row: Row, metric: str, side: int, number: int) -> Any:
    """One cell in one of the two plots."""
    points = [
        (throughput.value, latency.value, part)
        for part in _levels(row)
        if (throughput := row.get("output_throughput", part)) is not None
        and (latency := row.get(metric, part)) is not None
    ]
    colour = _COLOURS[number % len(_COLOURS)]
    signs = [_sign(row, part) for _, _, part in points]
    return go.Scatter(
        x=[x for x, _, _ in points],
        y=[y for _, y, _ in points],
        name=html.escape(row.name),
        mode="lines+markers+text",
        text=[f"{_users(part):g}" for _, _, part in points],
        textposition="top center",
        textfont={"size": 11, "color": colour},
        hovertext=[_story(row, part, x, y) for x, y, part in points],
        hoverinfo="text",
        legendgroup=str(number),
        showlegend=side == 0,
        line={"color": colour, "dash": _DASHES[number // len(_COLOURS) % len(_DASHES)]},
        marker={
            "symbol": [symbol for symbol, _ in signs],
            "size": [size for _, size in signs],
            "line": {"width": 2, "color": colour},
        },
        xaxis="x" if side == 0 else "x2",
        yaxis="y" if side == 0 else "y2",
    )


def _sign(row: Row, part: str) -> tuple[str, int]:
    """Symbol and size of a point; one that is both knee and most users is a ringed diamond."""
    found = [_SIGNS[mark[-1]] for mark in load_table.marks(row, part)]
    if len(found) == len(_SIGNS):
        return "diamond-open-dot", 15
    return (found[0], 14) if found else (_PLAIN, 6)


def _users(part: str) -> float:
    found = rows.load(part)
    return 0.0 if found is None else found.number


def _story(row: Row, part: str, throughput: float, latency: float) -> str:
    told = f"{rows.load_name(part)}: {numbers.plain(throughput)} tok/s, {numbers.plain(latency)} ms"
    return f"{html.escape(row.name)}<br>{told}"


def _layout(count: int) -> dict[str, Any]:
    """Two plots beside each other with one legend below."""
    grid = {"gridcolor": "#e8ebee", "zeroline": False, "rangemode": "tozero"}
    x = {"title": {"text": "output throughput [tok/s]"}, **grid}
    first, second = (title for _, title in _LATENCIES)
    dropped = count - MOST_LINES
    more = f"the first {MOST_LINES} of {count} cells" if dropped > 0 else ""
    return {
        "height": 460,
        "margin": {"l": 70, "r": 30, "t": 30, "b": 60},
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "title": {"text": more, "font": {"size": 12}},
        "legend": {"orientation": "h", "y": -0.22},
        "xaxis": {**x, "domain": [0, 0.46]},
        "xaxis2": {**x, "domain": [0.54, 1], "anchor": "y2"},
        "yaxis": {"title": {"text": first}, **grid},
        "yaxis2": {"title": {"text": second}, "anchor": "x2", **grid},
    }
