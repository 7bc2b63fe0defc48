"""The plan as text: one line a cell, columns only for what varies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qgrid.report import axes
from qgrid.types import PlannedCell


def render(planned: Sequence[PlannedCell]) -> str:
    """A table of the plan and a line that counts it."""
    named = axes.labels([p.cell for p in planned])
    rows = [
        {
            "cell": each.cell_id[:8],
            **labels,
            "GiB": _gib(each.predicted.get("total_bytes")),
            "will": _will(each),
        }
        for each, labels in zip(planned, named, strict=True)
    ]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [
        "  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip()
        for row in ({name: name for name in widths}, *rows)
    ]
    notes = dict.fromkeys(note for p in planned for note in p.notes)
    return "\n".join([*lines, "", *(f"note: {note}" for note in notes), _count(planned)])


def _count(planned: Sequence[PlannedCell]) -> str:
    kinds = Counter("run" if p.status is None else p.status for p in planned)
    added = sum(p.added for p in planned)
    artifacts = len({p.artifact_id for p in planned if p.status is None})
    qualities = len({p.quality_id for p in planned if p.status is None})
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    also = f" ({_many(added, 'baseline')} added)" if added else ""
    return (
        f"{_many(len(planned), 'cell')}: {counted}{also}; "
        f"{_many(artifacts, 'artifact')}, {_many(qualities, 'quality measurement')}"
    )


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"


def _will(planned: PlannedCell) -> str:
    if planned.status is not None:
        return f"{planned.status}: {planned.reason}"
    return "run (baseline)" if planned.baseline_cell_id is None else "run"
