"""Every load of the cells whose loads are a curve: throughput and latency, a line a load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgrid.metrics import METRICS
from qgrid.report import numbers, rows
from qgrid.report.columns import BOUND, UNSTABLE, Text, hint
from qgrid.report.rows import Row

FEWEST_LEVELS = 3  # of concurrency, for a curve
KNEE, MOST = "◆", "○"
_METRICS = (
    "prefill_throughput",
    "decode_throughput",
    "output_throughput",
    "goodput",
    "ttft_ms",
    "ttft_p99_ms",
    "tpot_ms",
    "tpot_p99_ms",
    "itl_p99_ms",
    "e2e_latency_ms",
    "failed_requests",
)
_TOLD = "output_throughput"  # every load that had an answer has it
_LEGEND = {
    KNEE: "knee: the concurrency with the most throughput for its latency",
    MOST: "the most users whose requests are answered as promised (`workload.slo`)",
    BOUND: "at least: the highest load that was measured was not too much",
    UNSTABLE: "unstable: repeats of this timing vary by more than 5 %, or others were in its way",
}


@dataclass(frozen=True)
class Table:
    """Heads, lines of a cell, and notes; the first two places of a line are cell and load."""

    heads: tuple[str, ...]
    titles: tuple[str, ...]
    groups: tuple[tuple[tuple[Text, ...], ...], ...]
    notes: tuple[tuple[str, str], ...]


def build(every: Sequence[Row]) -> Table | None:
    """The table of all curves; None where no cell has one."""
    curved = [row for row in every if has_curve(row)]
    if not curved:
        return None
    metrics = [metric for metric in _METRICS if any(_told(row, metric) for row in curved)]
    groups = tuple(tuple(_line(row, part, metrics) for part in _parts(row)) for row in curved)
    texts = "".join(text.whole for group in groups for line in group for text in line)
    defined = [METRICS[metric] for metric in metrics]
    return Table(
        heads=("cell", "load", *(f"{metric.title} {metric.unit}" for metric in defined)),
        titles=(
            "The cell of the sweep.",
            "Users at once, or requests a second.",
            *(metric.definition for metric in defined),
        ),
        groups=groups,
        notes=tuple((mark, sentence) for mark, sentence in _LEGEND.items() if mark in texts),
    )


def has_curve(row: Row) -> bool:
    """Whether a cell was measured at three concurrencies or more, or at a rate."""
    parts = _parts(row)
    closed = [part for part in parts if rows.is_closed(part)]
    return len(closed) >= FEWEST_LEVELS or len(closed) < len(parts)


def _parts(row: Row) -> list[str]:
    """All loads of a cell, those without any answer included."""
    found = {*rows.loads([row], _TOLD), *rows.loads([row], "failed_requests")}
    return rows.in_order(found)


def _told(row: Row, metric: str) -> bool:
    """Whether a figure says something; that nothing failed says nothing."""
    found = (row.get(metric, part) for part in _parts(row))
    return any(f is not None and (f.value > 0 or metric != "failed_requests") for f in found)


def _line(row: Row, part: str, metrics: Sequence[str]) -> tuple[Text, ...]:
    name = Text(row.name, hint=row.planned.cell_id)
    load = Text(rows.load_name(part), tail=" ".join(marks(row, part)))
    return name, load, *(_place(row, part, metric) for metric in metrics)


def _place(row: Row, part: str, metric: str) -> Text:
    measured = row.get(metric, part)
    if measured is None:
        return Text("-", "faint")
    if metric == "failed_requests":
        of = "" if measured.n is None else f" of {measured.n}"
        return Text(f"{measured.value:.0f}{of}", "bad" if measured.value else "", hint(measured))
    unstable = UNSTABLE if metric.endswith("throughput") and row.is_unstable(part) else ""
    return Text(unstable + numbers.plain(measured.value), hint=hint(measured))


def marks(row: Row, part: str) -> list[str]:
    """What a load is to its cell: its knee, the most users that it serves as promised."""
    found = []
    bounds = row.observed("at_least")
    for mark, metric in ((KNEE, "knee_concurrency"), (MOST, "max_users")):
        measured = row.get(metric)
        if measured is not None and part == f"concurrency={measured.value:.0f}":
            least = BOUND if isinstance(bounds, (list, tuple)) and metric in bounds else ""
            found.append(f"{least}{mark}")
    return found
