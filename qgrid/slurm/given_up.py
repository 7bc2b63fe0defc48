"""Cells whose tasks all ended without a record: why, and the record that says so."""

from __future__ import annotations

from pathlib import Path

from qgrid import environment
from qgrid.running import assembly, attempts, endings
from qgrid.slurm import submissions
from qgrid.slurm.client import TaskState
from qgrid.slurm.submissions import Submission
from qgrid.store import leases, records
from qgrid.types import Failure, PlannedCell, Status


def why(
    folder: Path, launch: str, planned: PlannedCell, last: tuple[Submission, TaskState] | None
) -> Failure:
    """Why a cell of the sweep in `folder` is given up, with the last words of its last task."""
    earlier = attempts.earlier(records.path(folder.parents[1], planned.cell_id).parent, launch)
    status: Status = "timeout" if earlier.why == attempts.TIME_LIMIT else "crashed"
    said = earlier.sentence if earlier.count else "its tasks ended before they began it"
    if last is None:
        return Failure(status, said)
    submission, state = last
    place = submissions.folder_of(folder, submission.launch)
    log = place / "logs" / f"{submission.array}-{state.index}.log"
    tail = endings.log_tail(log)
    words = f"; its last words: {tail.rsplit(chr(10), maxsplit=1)[-1]}" if tail else ""
    hint = "; raise `hydra.launcher.memory_gib`" if state.state == "OUT_OF_MEMORY" else ""
    ended = f"task {state.label} ended as {state.state} (log: {log}){words}"
    return Failure(status, f"{said}; {ended}{hint}", tail or None)


def write(store: Path, launch: str, planned: PlannedCell, failure: Failure) -> None:
    """Write the record, unless somebody is at the cell right now."""
    lease = leases.attempt(leases.of(store, "cells", planned.cell_id))
    if lease is None:
        return
    now = {**environment.provenance(), **environment.momentary(), "launch": launch}
    try:
        records.write(store, assembly.refused(planned, failure.status, failure.message, now))
    finally:
        lease.release()
