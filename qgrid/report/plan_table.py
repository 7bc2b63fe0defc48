"""The plan as text: one line a cell, columns only for what varies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from qgrid.types import PlannedCell

COLUMNS: dict[str, Callable[[PlannedCell], str]] = {
    "cell": lambda p: p.cell_id[:8],
    "model": lambda p: p.cell.model.name if p.cell.model.name != "hf" else p.cell.model.id,
    "method": lambda p: p.cell.method.name,
    "bits": lambda p: str(p.cell.bits),
    "runtime": lambda p: p.cell.runtime.name,
    "gpu": lambda p: p.cell.gpu.name,
    "kv_cache": lambda p: p.cell.kv_cache.name,
    "context": lambda p: str(p.cell.context),
    "slices": lambda p: p.cell.slices.name,
    "workload": lambda p: p.cell.workload.name,
    "seed": lambda p: str(p.cell.seed),
    "GiB": lambda p: _gib(p.predicted.get("total_bytes")),
    "will": lambda p: _will(p),  # noqa: PLW0108 - defined below
}
ALWAYS = ("cell", "method", "bits", "GiB", "will")


def render(planned: Sequence[PlannedCell]) -> str:
    """A table of the plan and a line that counts it."""
    rows = {name: [cell(p) for p in planned] for name, cell in COLUMNS.items()}
    shown = [name for name in COLUMNS if name in ALWAYS or len(set(rows[name])) > 1]
    widths = {name: max(len(name), *(len(text) for text in rows[name])) for name in shown}
    lines = ["  ".join(name.ljust(widths[name]) for name in shown).rstrip()]
    for index in range(len(planned)):
        cells = (rows[name][index].ljust(widths[name]) for name in shown)
        lines.append("  ".join(cells).rstrip())
    notes = dict.fromkeys(note for p in planned for note in p.notes)
    return "\n".join([*lines, "", *(f"note: {note}" for note in notes), _count(planned)])


def _count(planned: Sequence[PlannedCell]) -> str:
    kinds = Counter("run" if p.status is None else p.status for p in planned)
    added = sum(p.added for p in planned)
    artifacts = len({p.artifact_id for p in planned if p.status is None})
    qualities = len({p.quality_id for p in planned if p.status is None})
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"{_many(len(planned), 'cell')}: {counted} ({_many(added, 'baseline')} added); "
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
