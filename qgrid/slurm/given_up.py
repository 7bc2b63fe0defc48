"""Cells whose tasks all ended without a record: why, and the record that says so."""

from __future__ import annotations

from pathlib import Path

from qgrid import assembly, attempts, environment, leases, records
from qgrid.slurm.client import TaskState
from qgrid.slurm.submissions import Submission
from qgrid.types import Failure, PlannedCell, Status


def why(
    store: Path, launch: str, planned: PlannedCell, last: tuple[Submission, TaskState] | None
) -> Failure:
    """Why a cell is given up, with the place of the log of its last task where there is one."""
    earlier = attempts.earlier(records.path(store, planned.cell_id).parent, launch)
    status: Status = "timeout" if earlier.why == attempts.TIME_LIMIT else "crashed"
    said = earlier.sentence if earlier.count else "its tasks ended before they began it"
    if last is None:
        return Failure(status, said)
    submission, state = last
    log = f"launches/{submission.launch}/logs/{submission.array}-{state.index}.log"
    hint = "; raise `hydra.launcher.memory_gib`" if state.state == "OUT_OF_MEMORY" else ""
    return Failure(status, f"{said}; task {state.label} ended as {state.state} (see {log}){hint}")


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
