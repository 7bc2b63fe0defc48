"""Artifacts made ahead of their cells: by one process each, and not tried for ever."""

from __future__ import annotations

import contextlib
from pathlib import Path

from qgrid.running import assembly
from qgrid.running.attempts import Attempts
from qgrid.running.launch import Launch
from qgrid.running.pipeline import Pipeline
from qgrid.store import leases, place, records
from qgrid.types import PlannedCell, StageResult


def make(planned: PlannedCell, pipeline: Pipeline, launch: Launch, attempts: Attempts) -> bool:
    """Make the artifact of a cell unless it is there; False: another process is at it.

    Only who holds its lease counts an attempt: who waits has not tried.

    Raises:
        Stopped: the sweep was told to end.
        OSError: the store cannot be written to.
    """
    lease = leases.attempt(leases.of(launch.store, "artifacts", planned.artifact_id))
    if lease is None:
        return False
    folder = launch.store / "builds" / planned.artifact_id
    try:
        is_there = launch.has_artifact(planned.artifact_id)
        if not is_there:
            _give_up(folder, launch, attempts)
        with contextlib.nullcontext() if is_there else attempts.counted(folder):
            pipeline.build(planned, lease)
    except leases.Lost:
        return False
    except Exception as error:
        if place.is_unwritable(error):
            raise
        failure = assembly.fault(error)  # its cells' end, not the grid's
        launch.made[planned.artifact_id] = StageResult("artifact", failure=failure)
    finally:
        lease.release()
    return True


def _give_up(folder: Path, launch: Launch, attempts: Attempts) -> None:
    """Write down that an artifact was tried too often; its cells fail by it."""
    given_up = attempts.given_up(folder)
    if given_up is not None:
        told = StageResult("artifact", failure=given_up, environment={"launch": launch.id})
        records.save_result(folder / "result.json", told)
