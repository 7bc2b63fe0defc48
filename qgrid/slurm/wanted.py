"""Which cells of a sweep a launch still has to bring to a record, by a glance at their records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from qgrid import timing
from qgrid.running import launch as launches
from qgrid.running.decisions import UNCOMPARED, UNRUN
from qgrid.store import glance, records
from qgrid.types import FINAL, RECORD_SCHEMA, PlannedCell, Settings
from qgrid.weights import artifacts


class Wanted:
    """Decides without the machines that measured: another one's environment is never stale here."""

    def __init__(self, folder: Path, settings: Settings, launch: str) -> None:
        self._store = folder.parents[1]
        self._settings = settings
        self._launch = launch
        self._since = launches.since(folder) | {launch}

    def cells(self, planned: Sequence[PlannedCell]) -> list[PlannedCell]:
        """Those that need a task, in the order of the plan; refused cells need none.

        Raises:
            records.UnreadableRecord: a record of another version.
        """
        return [each for each in planned if each.status is None and self.needs(each)]

    def needs(self, planned: PlannedCell) -> bool:
        """Whether a cell has no record, or one that this launch is to replace."""
        head = self._head(planned)
        if head is None or head.status is None:
            return True
        if not self._asked_again(planned, head.status):
            return False
        launch = self.launch_of(planned)
        if launch == self._launch:
            return False
        is_final = head.status in FINAL and head.status not in UNRUN
        return (
            launch not in self._since or not is_final or self._is_incomplete(planned, head.status)
        )

    def has_record(self, planned: PlannedCell) -> bool:
        """Whether there is a record that can be read."""
        head = self._head(planned)
        return head is not None and head.status is not None

    def has_good_record(self, planned: PlannedCell) -> bool:
        """Whether there is a record that somebody may go by."""
        head = self._head(planned)
        return head is not None and head.status == "ok"

    def launch_of(self, planned: PlannedCell) -> str | None:
        """The launch that wrote the cell's record."""
        record = glance.whole(records.path(self._store, planned.cell_id))
        found = None if record is None else record.get("environment", {}).get("launch")
        return None if found is None else str(found)

    def missing(self, artifact_ids: Iterable[str]) -> list[str]:
        """Those of these artifacts that have to be made."""
        fresh = self._settings.fresh
        wanted = dict.fromkeys(artifact_ids)
        return [each for each in wanted if fresh or not artifacts.exists(self._store, each)]

    def _asked_again(self, planned: PlannedCell, status: str) -> bool:
        rerun = self._settings.rerun
        if self._settings.fresh or "stale" in rerun:  # each machine knows what is stale there
            return True
        if status not in FINAL or status in {*UNRUN, *rerun}:
            return True
        if self._is_incomplete(planned, status):
            return True
        if "unstable" not in rerun:
            return False
        record = records.read(self._store, planned.cell_id)
        return record is not None and timing.is_unstable(*record.measurements)

    def _is_incomplete(self, planned: PlannedCell, status: str) -> bool:
        """Whether a part is missing: its quality was set aside, or its baseline was not there."""
        result = self._store / "quality" / planned.quality_id / "result.json"
        if status == "ok" and not result.exists():
            return True
        if planned.baseline_cell_id is None:
            return False
        record = glance.whole(records.path(self._store, planned.cell_id))
        return record is not None and UNCOMPARED in record.get("observed", {})

    def _head(self, planned: PlannedCell) -> glance.Head | None:
        file = records.path(self._store, planned.cell_id)
        head = glance.head(file)
        if head is not None and head.schema is not None and head.schema != RECORD_SCHEMA:
            records.load(file)  # says what to do about it
        return head
