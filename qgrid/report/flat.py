"""One line a cell with every measurement, full precision, the unit in the name of each column."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from qgrid import codec
from qgrid.report import axes, rows
from qgrid.report.rows import Row
from qgrid.types import Measurement, PlannedCell, Record

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def render(planned: Sequence[PlannedCell], records: Sequence[Record]) -> str:
    """The CSV text: identities, status, configuration, measurements with intervals, speed-ups.

    Columns of a measurement: `metric/slice [unit]` and the same with `stderr`, `low`, `high`, and
    `n`. Columns that no cell fills are left out.
    """
    lines = [_line(row) for group in rows.groups(planned, records) for row in group]
    columns = dict.fromkeys(column for line in lines for column in line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _line(row: Row) -> dict[str, Any]:
    planned = row.planned
    configured = axes.flat(codec.plain(planned.cell))
    measured = () if row.record is None else row.record.measurements
    line: dict[str, Any] = {
        "cell_id": planned.cell_id,
        "artifact_id": planned.artifact_id,
        "quality_id": planned.quality_id,
        "baseline_cell_id": planned.baseline_cell_id,
        "status": row.status,
        "reason": row.reason,
        "decompressed": row.is_decompressed,
        "kernel": row.kernel,
        **{f"cell.{key}": value for key, value in configured.items()},
    }
    for measurement in measured:
        line |= _columns(measurement)
    return line | _speedups(row)


def _columns(measurement: Measurement) -> dict[str, Any]:
    where = "" if measurement.slice is None else f"/{measurement.slice}"
    name, unit = measurement.metric + where, f"[{measurement.unit}]"
    values = {
        f"{name} {unit}": measurement.value,
        f"{name} stderr {unit}": measurement.stderr,
        f"{name} low {unit}": measurement.low,
        f"{name} high {unit}": measurement.high,
        f"{name} n [1]": measurement.n,
    }
    return {key: value for key, value in values.items() if value is not None}


def _speedups(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for metric in ("prefill_throughput", "decode_throughput"):
        for part in rows.loads([row], metric):
            gain = row.ratio(metric, part)
            if gain is not None:
                name = f"{metric} over baseline/{part}"
                line[f"{name} [x]"] = gain.value
                line[f"{name} low [x]"], line[f"{name} high [x]"] = gain.low, gain.high
                line[f"{name} claimed"] = gain.is_claimed
    return line


def _safe(value: Any) -> Any:
    """Numbers at full precision; text that a spreadsheet would run as a formula gets a quote."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return "" if value is None else value
