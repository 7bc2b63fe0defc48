"""The parallel-coordinates plot: a line a measured cell over method, bits, cost and quality."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qgrid.report import numbers, rows
from qgrid.report.rows import ALONE, Row

Number = Callable[[Row], float | None]
_COLOURS = [[0.0, "#1a9850"], [0.45, "#8fb339"], [0.75, "#f0a030"], [1.0, "#c0392b"]]


@dataclass(frozen=True)
class Axis:
    """One vertical line; `names` are the categories of a textual one, in order."""

    title: str
    of: Number
    names: tuple[str, ...] = ()
    is_log: bool = False


def render(every: Sequence[Row]) -> str:
    """An HTML fragment with plotly inside; empty when fewer than two cells can be drawn."""
    shown = [row for row in every if row.status == "ok"]
    axes = [axis for axis in _axes(shown) if _has_all(axis, shown)]
    if len(shown) < 2 or len(axes) < 2:
        return ""
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Parcoords(
            dimensions=[_dimension(axis, shown) for axis in axes],
            line=_line(shown),
            labelfont={"size": 13, "color": "#222"},
            tickfont={"size": 12, "color": "#444"},
            rangefont={"size": 1, "color": "rgba(0,0,0,0)"},  # the ticks already say it
            labelangle=0,
        )
    )
    figure.update_layout(
        height=430,
        margin={"l": _left(axes[0]), "r": 90, "t": 70, "b": 40},
        font={"family": "system-ui, sans-serif"},
        paper_bgcolor="rgba(0,0,0,0)",
    )
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=True,
            div_id="parallel",
            config={"displaylogo": False, "responsive": True, "displayModeBar": False},
        )
    )


def _left(first: Axis) -> int:
    """Pixels left of the first axis, whose names stand there."""
    longest = max((len(_short(name)) for name in first.names), default=0)
    return max(90, 20 + 7 * longest)


def _axes(shown: Sequence[Row]) -> list[Axis]:
    names = tuple(dict.fromkeys(row.labels["method"] for row in shown))
    sizes = [_value(row, "size_on_disk_bytes") or 0 for row in shown]
    unit, scale = numbers.byte_unit(sizes)
    return [
        Axis("method", lambda row: float(names.index(row.labels["method"])), names),
        *_varying(shown),
        Axis("bits", lambda row: float(row.planned.cell.bits)),
        Axis(f"size<br>{unit}", _scaled("size_on_disk_bytes", scale)),
        Axis(f"weights in memory<br>{unit}", _scaled("resident_weights_bytes", scale)),
        Axis("decode, batch 1<br>tok/s", lambda row: _value(row, "decode_throughput", ALONE)),
        Axis("KLD<br>nats", _divergence, is_log=True),
        Axis("worst slice<br>points", worst_change),
        Axis("mean accuracy<br>%", mean_accuracy),
    ]


def _varying(shown: Sequence[Row]) -> list[Axis]:
    """The other axes of the sweep, as categories."""
    others = [axis for axis in (shown[0].labels if shown else ()) if axis not in ("method", "bits")]
    return [_category(axis, shown) for axis in others]


def _category(axis: str, shown: Sequence[Row]) -> Axis:
    names = tuple(dict.fromkeys(row.labels[axis] for row in shown))
    return Axis(axis, lambda row: float(names.index(row.labels[axis])), names)


def _value(row: Row, metric: str, part: str | None = None) -> float | None:
    measured = row.get(metric, part)
    return None if measured is None else measured.value


def _scaled(metric: str, scale: float) -> Number:
    def of(row: Row) -> float | None:
        value = _value(row, metric)
        return None if value is None else value / scale

    return of


def _divergence(row: Row) -> float | None:
    """The KL divergence; a baseline has its floor, or none to speak of."""
    value = _value(row, "kld_mean")
    return 0.0 if value is None and row.is_baseline else value


def worst_change(row: Row) -> float | None:
    """The largest fall of a slice in points; a baseline's is 0."""
    if row.is_baseline:
        return 0.0
    return min((100 * change.value for change in row.changes.values()), default=None)


def mean_accuracy(row: Row) -> float | None:
    """Mean over the slices, in percent: a summary for the eye, never for a verdict."""
    found = [_value(row, "accuracy", name) for name in rows.slices([row])]
    known = [value for value in found if value is not None]
    return 100 * sum(known) / len(known) if known else None


def _has_all(axis: Axis, shown: Sequence[Row]) -> bool:
    """Whether every line has a place on the axis: plotly draws a missing one as a wrong one."""
    return bool(shown) and all(axis.of(row) is not None for row in shown)


def _dimension(axis: Axis, shown: Sequence[Row]) -> dict[str, Any]:
    values = [float(value) for row in shown if (value := axis.of(row)) is not None]
    if axis.names:
        # Plotly reads markup in labels; names are text.
        names = [html.escape(_short(name)) for name in axis.names]
        top = max(len(names) - 1, 1)
        return {
            "label": axis.title,
            "values": values,
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [-0.2, top + 0.2],
        }
    if axis.is_log:
        return _logarithmic(axis, values)
    ticks = sorted(set(values))
    if len(ticks) <= 4:
        texts = [numbers.plain(tick) if tick % 1 else f"{tick:.0f}" for tick in ticks]
        return {"label": axis.title, "values": values, "tickvals": ticks, "ticktext": texts}
    return {"label": axis.title, "values": values}


def _logarithmic(axis: Axis, values: Sequence[float]) -> dict[str, Any]:
    """Powers of ten as ticks; zero stands one step below the smallest positive value."""
    positive = [value for value in values if value > 0]
    if not positive:
        return {"label": axis.title, "values": list(values)}
    bottom = math.floor(math.log10(min(positive)))
    top = math.ceil(math.log10(max(positive)))
    has_zero = len(positive) < len(values)
    start = bottom - 1 if has_zero else bottom
    powers = list(range(bottom, max(top, bottom + 1) + 1))
    texts = [f"{10.0**power:g}" for power in powers]
    return {
        "label": axis.title,
        "values": [math.log10(value) if value > 0 else start for value in values],
        "tickvals": [start, *powers] if has_zero else powers,
        "ticktext": ["0", *texts] if has_zero else texts,
        "range": [start, powers[-1]],
    }


def _line(shown: Sequence[Row]) -> dict[str, Any]:
    """Colour by how far a cell is from its baseline: green is near."""
    distances = [_divergence(row) for row in shown]
    known = [value for value in distances if value is not None and value > 0]
    if not known or None in distances:
        return {"color": [row.planned.cell.bits for row in shown], "colorscale": "Viridis"}
    least = min(known)  # a baseline's own is 0, and rounding makes one of 0 a little less
    return {
        "color": [math.log10(max(value or least, least)) for value in distances],
        "colorscale": _COLOURS,
    }


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
