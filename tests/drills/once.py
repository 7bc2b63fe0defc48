"""What was done how often, by the ledger of the stages; and by whom, by the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qgrid import codec
from qgrid.store import records
from qgrid.types import PlannedCell
from tests.drills import trivial


def begun(ledger: Path, stage: str) -> Counter[str]:
    """How often a stage began, by what it was for."""
    notes = trivial.ledger(ledger)
    return Counter(n["cell"] for n in notes if n["stage"] == stage and n["event"] == "begin")


def assert_each_once(ledger: Path, cells: Sequence[PlannedCell]) -> None:
    """Every artifact was built once, every quality measured once, every cell timed once."""
    artifacts = {codec.digest([c.cell.model, c.cell.method, c.cell.bits]) for c in cells}
    assert begun(ledger, "artifact") == dict.fromkeys(artifacts, 1)
    assert begun(ledger, "speed") == {codec.digest(cell.cell): 1 for cell in cells}
    assert _loaded(ledger, cells) == _loads(cells)


def _loaded(ledger: Path, cells: Sequence[PlannedCell]) -> Counter[str]:
    """How often each quality's own model was loaded to be scored."""
    return Counter(
        cell.quality_id
        for cell in cells
        for note in trivial.ledger(ledger)
        if note["stage"] == "quality" and note["event"] == "begin"
        if note["cell"] == codec.digest(cell.cell) and note["artifact"] == cell.artifact_id
    )


def _loads(cells: Sequence[PlannedCell]) -> Counter[str]:
    """Once for itself; a baseline once more for each quality that is compared with it."""
    quality = {cell.cell_id: cell.quality_id for cell in cells}
    compared = {
        (cell.quality_id, quality[cell.baseline_cell_id])
        for cell in cells
        if cell.baseline_cell_id is not None
    }
    return Counter(set(quality.values())) + Counter(base for _, base in compared)


def launches(store: Path, cells: Sequence[PlannedCell]) -> set[str]:
    """Who brought the cells to their records, which are all `ok`."""
    every = [records.read(store, cell.cell_id) for cell in cells]
    assert all(record is not None and record.status == "ok" for record in every)
    return {str(record.environment["launch"]) for record in every if record is not None}
