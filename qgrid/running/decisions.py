"""What a launch does about a cell, given its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qgrid import device, registry, timing
from qgrid.types import FINAL, Cell, Gpu, PlannedCell, Record, Settings

Decision = Literal["run", "rerun_stale", "complete", "done", "stale", "refuse", "wrong_device"]
WORDS: dict[Decision, str] = {
    "run": "to run",
    "rerun_stale": "stale, to run again",
    "complete": "to complete, for a part was missing",
    "done": "done before",
    "stale": "stale (measured in another environment; `rerun=stale` repeats them)",
    "refuse": "refused",
    "wrong_device": "for another device",
}
REMARKS: dict[Decision, str] = {
    "done": "(done before)",
    "stale": "(stale: measured in another environment)",
}
TO_RUN: frozenset[Decision] = frozenset({"run", "rerun_stale", "complete"})
UNCOMPARED = "uncompared"  # in a record's `observed`: why its baseline was not there yet
REFUSALS: tuple[Decision, ...] = ("refuse", "wrong_device")
UNRUN = ("unsupported", "does_not_fit", "wrong_device")  # statuses of cells that never ran
MEASURED = ("ok", "oom")  # what was found out stays, also when a plan refuses the cell by now


@dataclass(frozen=True)
class Rule:
    """What decides beside the record: settings, this machine, its environment, the launch."""

    settings: Settings
    found: Gpu
    fingerprint: str
    launch: str
    since: frozenset[str] = frozenset()  # launches of the same command: they were asked the same

    def decide(self, planned: PlannedCell, record: Record | None) -> Decision:
        """What to do about a cell, which has this record."""
        if record is not None and record.environment.get("launch") == self.launch:
            return "done"  # another machine of this launch was here
        if planned.status is not None:
            stays = record is not None and (record.status in MEASURED or _says(record, planned))
            return "done" if stays else "refuse"
        if not may_run_here(planned.cell, self.found):
            # what the right device has found out stays
            return "wrong_device" if record is None or record.status in UNRUN else "done"
        if record is None or self._is_wanted_again(record):
            return "run"
        if record.environment.get("fingerprint") == self.fingerprint:
            return "complete" if UNCOMPARED in record.observed else "done"
        return "rerun_stale" if "stale" in self.settings.rerun else "stale"

    def _is_wanted_again(self, record: Record) -> bool:
        """Whether a record is no final word, or of a kind that `fresh` or `rerun` names."""
        if record.status not in FINAL or record.status in UNRUN:
            return True
        if record.environment.get("launch") in self.since:
            return False
        if self.settings.fresh or record.status in self.settings.rerun:
            return True
        return "unstable" in self.settings.rerun and timing.is_unstable(*record.measurements)


def may_run_here(cell: Cell, found: Gpu) -> bool:
    """Whether this machine is the planned one, or has nothing to do with it."""
    remote = registry.runtime(cell.runtime.name).LOADS.remote
    return remote or device.matches(cell.gpu, found)


def _says(record: Record, planned: PlannedCell) -> bool:
    """Whether a record is the refusal that the plan states."""
    reason = None if record.error is None else record.error.message
    return record.status == planned.status and reason == planned.reason
