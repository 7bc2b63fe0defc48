"""What a remote launcher gives to a machine: some cells of a plan, and the artifacts they need."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pydantic import PositiveInt

from qgrid import codec
from qgrid.running import attempts, controller, stopping
from qgrid.store import glance
from qgrid.types import PlannedCell, Settings

AGAIN = 75  # exit code of a task that was told to end with work left (EX_TEMPFAIL of sysexits.h)
_CODES = {
    controller.INTERRUPTED: AGAIN,
    controller.STORE_FAILED: 1,
    controller.UNREADABLE: controller.UNREADABLE,
}
_IDS = re.compile(
    r'\{"cell_id": "(\w+)", "artifact_id": "(\w+)", "quality_id": "\w+", '
    r'"baseline_cell_id": (?:null|"(\w+)")'
)


@dataclass(frozen=True)
class Task:
    """Work for one process, in this order: artifact ids to make, cell ids to measure."""

    builds: tuple[str, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class TaskList:
    """The tasks of a launch. `attempts`: of one cell, before it is given up."""

    launch: str
    attempts: PositiveInt
    tasks: tuple[Task, ...]


def run(folder: Path, tasks: TaskList, index: int) -> int:
    """Do one task of the sweep in `folder`.

    SIGTERM ends it at once, SIGUSR1 too and says that the time limit is near; nothing is torn.

    Returns:
        0 when each of its cells has a record, whatever its status; `AGAIN` when it was told to
        end before; 1 when the store cannot be written to; 2 when a record cannot be read.
    """
    task = tasks.tasks[index]
    settings = codec.read(Settings, folder / "settings.json")
    cells, builds, others = _planned(folder / "plan.jsonl", task)
    part = controller.Part(tasks.launch, builds=builds, others=others, attempts=tasks.attempts)
    sweep = controller.Sweep(cells, settings, folder, part=part)
    with stopping.on_signal(_time_is_up, (signal.SIGUSR1,)):
        code = controller.bring(sweep)
    return 0 if code is None else _CODES[code]


def _planned(
    plan_file: Path, task: Task
) -> tuple[list[PlannedCell], tuple[PlannedCell, ...], tuple[PlannedCell, ...]]:
    """The cells of a task, one cell for each artifact to make, and what its cells compare with.

    Only their lines are parsed: a plan has thousands. What a later plan of the sweep has left out
    is nobody's wish any more.
    """
    by_cell: dict[str, str] = {}
    by_artifact: dict[str, str] = {}
    base_of: dict[str, str] = {}
    for line in glance.plan_lines(plan_file):
        found = _IDS.match(line)
        if found is None:
            raise codec.InvalidValue(f"{plan_file} has a line that is no planned cell; plan again")
        by_cell[found[1]] = line
        by_artifact.setdefault(found[2], line)
        if found[3] is not None:
            base_of[found[1]] = found[3]

    def cells(lines: Iterator[str]) -> tuple[PlannedCell, ...]:
        return tuple(codec.loads(PlannedCell, line) for line in lines)

    wanted = cells(by_cell[each] for each in task.cells if each in by_cell)
    builds = cells(by_artifact[each] for each in task.builds if each in by_artifact)
    ids = {base_of[each.cell_id] for each in (*wanted, *builds) if each.cell_id in base_of}
    compared = cells(by_cell[each] for each in sorted(ids & by_cell.keys()))
    return list(wanted), builds, compared


def _time_is_up(_: int, __: FrameType | None) -> NoReturn:
    raise stopping.Interrupted(attempts.TIME_LIMIT)
