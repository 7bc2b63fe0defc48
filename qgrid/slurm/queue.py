"""How the arrays of a sweep stand in Slurm's queue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qgrid.queued import Standing
from qgrid.slurm import client, script, submissions
from qgrid.slurm.client import TaskState
from qgrid.slurm.submissions import Submission
from qgrid.store import leases, place

UNKNOWN = "GONE"  # it has left the queue, and nobody keeps accounts


@dataclass(frozen=True)
class Look:
    """What was submitted for a sweep, and the states of its tasks at one moment."""

    submitted: tuple[Submission, ...]
    states: dict[tuple[str, int], TaskState]

    def of(self, submission: Submission, index: int) -> TaskState:
        """The state of a task; `UNKNOWN` where Slurm has forgotten it."""
        job = submission.job or "none"
        return self.states.get((job, index), TaskState(job, index, UNKNOWN))

    def is_live(self, state: TaskState) -> bool:
        """Whether it waits or runs."""
        return state.state != UNKNOWN and state.is_live

    def live_cells(self) -> set[str]:
        """The cells of all tasks that wait or run."""
        return {
            cell
            for submission, index, state in self.tasks()
            if self.is_live(state)
            for cell in submission.tasks[index].cells
        }

    def live_builds(self) -> set[str]:
        """The artifacts of all tasks that wait or run."""
        return {
            build
            for submission, index, state in self.tasks()
            if self.is_live(state)
            for build in submission.tasks[index].builds
        }

    def live_launches(self) -> list[str]:
        """Launches that have tasks which wait or run."""
        live = (each.launch for each, _, state in self.tasks() if self.is_live(state))
        return list(dict.fromkeys(live))

    def tasks(self) -> Iterator[tuple[Submission, int, TaskState]]:
        """Every task with its state."""
        for submission in self.submitted:
            for index in range(len(submission.tasks)):
                yield submission, index, self.of(submission, index)

    def latest(self, launch: str | None = None) -> dict[str, tuple[Submission, TaskState]]:
        """By cell its last task, of one launch or of all; one that lives goes before others."""
        result: dict[str, tuple[Submission, TaskState]] = {}
        for submission, index, state in self.tasks():
            if launch not in (None, submission.launch):
                continue
            for cell in submission.tasks[index].cells:
                known = result.get(cell)
                if known is None or self.is_live(state) or not self.is_live(known[1]):
                    result[cell] = (submission, state)
        return result


def look(folder: Path, accounts: bool | None = None) -> Look:
    """Ask Slurm about all that was submitted for a sweep; nothing is asked where nothing was.

    `accounts`: whether sacct remembers jobs; None: ask that, too.
    """
    known = submissions.read(folder)
    if not known:
        return Look((), {})
    queue = client.queue()
    known = submissions.found(folder, known, {each.name: each.job for each in queue})
    jobs = {
        each.job: script.job_name(each.launch, each.array) for each in known if each.job is not None
    }
    states = _by_task(queue, jobs)
    forgotten = sorted(jobs.keys() - {job for job, _ in states})
    if forgotten and (client.cluster().accounts if accounts is None else accounts):
        with contextlib.suppress(client.SlurmError):  # no accounts now; they have ended anyway
            states |= _by_task(client.history(forgotten), jobs)
    return Look(tuple(known), states)


def standing(folder: Path) -> dict[str, Standing]:
    """Where the cells that were submitted stand, by cell id."""
    seen = look(folder)
    return {cell: _standing(state) for cell, (_, state) in seen.latest().items()}


def cancel(folder: Path) -> list[str]:
    """End all jobs of a sweep that wait or run; a line for each.

    A launcher that submits right now does so to the end first: nothing comes after the cancelling.
    """
    if not submissions.read(folder):
        return []
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(leases.held(leases.of(folder.parents[1], "sweeps", folder.name)))
        except OSError as error:
            if not place.is_unwritable(error):  # else nobody can submit
                raise
        return _cancel(folder)


def _cancel(folder: Path) -> list[str]:
    seen = look(folder)
    live = [each for each in seen.tasks() if seen.is_live(each[2])]
    jobs = list(dict.fromkeys(state.job for _, _, state in live))
    client.cancel(jobs)
    counts = {job: sum(state.job == job for _, _, state in live) for job in jobs}
    return [f"cancelled job {job} ({count} tasks)" for job, count in counts.items()]


def _standing(state: TaskState) -> Standing:
    if state.state == UNKNOWN:
        return Standing("ended", state.label, "has left the queue")
    if not state.is_live:
        return Standing("ended", state.label, state.state, state.nodes or None)
    if state.state in {"RUNNING", "COMPLETING"}:
        return Standing("running", state.label, state.state, state.nodes or None)
    why = state.reason if state.reason not in {"", "None"} else state.state
    return Standing("queued", state.label, why)


def _by_task(states: list[TaskState], jobs: Mapping[str, str]) -> dict[tuple[str, int], TaskState]:
    """States of our jobs: number and name, for another cluster gives the same numbers."""
    return {
        (each.job, each.index): each
        for each in states
        if each.index is not None and jobs.get(each.job) == each.name
    }
