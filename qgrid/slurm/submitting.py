"""Submitting what is neither done nor queued: one launcher at a time, whoever else waits."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qgrid.running.expected import Expected
from qgrid.running.tasks import TaskList
from qgrid.slurm import arrays, client, queue, script, submissions
from qgrid.slurm.arrays import Array
from qgrid.slurm.options import Options
from qgrid.slurm.queue import Look
from qgrid.slurm.submissions import Submission
from qgrid.slurm.wanted import Wanted
from qgrid.store import leases
from qgrid.types import PlannedCell, Settings


@dataclass(frozen=True)
class Sweep:
    """What does not change while a launcher works for a sweep."""

    folder: Path
    planned: tuple[PlannedCell, ...]
    settings: Settings
    options: Options
    cluster: client.Cluster

    @property
    def store(self) -> Path:
        """The root of all outputs."""
        return self.folder.parents[1]

    @property
    def lease(self) -> Path:
        """Who holds it may submit."""
        return leases.of(self.store, "sweeps", self.folder.name)

    def look(self) -> Look:
        """What was submitted, and how it stands now."""
        return queue.look(self.folder, self.cluster.accounts)


def submit(
    sweep: Sweep, wanted: Wanted, seen: Look, launch: str, cells: Sequence[PlannedCell]
) -> Iterator[Submission]:
    """Submit these cells, and the artifacts that they lack, under the sweep's lease, one by one.

    Raises:
        client.SlurmError: an array was refused; those before it are submitted.
    """
    used = [each.artifact_id for each in [*cells, *_baselines(sweep, cells)]]
    ids = [each for each in wanted.missing(used) if each not in seen.live_builds()]
    makers = {each.artifact_id: each for each in reversed(sweep.planned)}  # as a task picks them
    missing = [makers[each] for each in ids]
    terms = arrays.Terms(
        Expected.load(sweep.store),
        sweep.settings.limits,
        sweep.options,
        sweep.cluster.max_array_size,
    )
    planned = arrays.plan(cells, missing, terms)
    names = submissions.next_arrays(sweep.folder, launch, [each.wave for each in planned])
    done: list[Submission] = []
    for name, array in zip(names, planned, strict=True):
        jobs = [str(done[place].job) for place in array.after]
        done.append(_submit_one(sweep, launch, name, array, jobs))
        yield done[-1]


def _submit_one(
    sweep: Sweep, launch: str, name: str, array: Array, after: Sequence[str]
) -> Submission:
    options = sweep.options
    job = script.Job(launch, name, len(array.tasks), array.resources, tuple(after))
    python = sys.executable if options.python is None else options.python
    text = script.render(job, options, python, str(Path.cwd()))
    tasks = TaskList(launch, options.attempts, array.tasks)
    return submissions.submit(sweep.folder, name, tasks, text)


def _baselines(sweep: Sweep, cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    """What these cells are compared with."""
    by_id = {each.cell_id: each for each in sweep.planned}
    ids = dict.fromkeys(each.baseline_cell_id for each in cells)
    found = [by_id[each] for each in ids if each is not None and each in by_id]
    return [each for each in found if each.status is None]
