"""`qgrid reproduce LOCK`: what differs from a lock, then its cells again, then every number."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qgrid import codec, commands, device, launchers, registry, sweep
from qgrid.files import HashCache, write_atomic
from qgrid.planning.facts import Facts
from qgrid.reproduction import differences, inputs, judgement, parts, replan, show, sweep_lock
from qgrid.reproduction.judgement import Circumstances, Verdict
from qgrid.reproduction.lock import FILE, Lock, LockedCell, Parts
from qgrid.running import launch
from qgrid.running.progress import labels
from qgrid.store import records
from qgrid.types import PlannedCell, Settings, Tracking

USAGE = "LOCK [out=FOLDER] [--dry-run] [--trust]"
FOLDER = "reproduced"  # below the root of all outputs
RESULT = "reproduction.json"  # in the folder of the sweep that was run again
ENDED = (0, 1)  # exit codes of a sweep that came to its end


@dataclass(frozen=True)
class Task:
    """A lock, where it lies, and where its cells are run."""

    lock: Lock
    place: Path  # the lock's folder
    out: Path  # the root of all outputs

    @property
    def store(self) -> Path:
        """A store of its own, so that nothing measured before is taken for a second run."""
        return self.out / FOLDER / self.lock.name

    @property
    def sweep(self) -> Path:
        """The folder of the sweep that runs the cells again."""
        return self.store / "sweeps" / self.lock.name


def main(arguments: list[str]) -> int:
    """Run a lock again and compare; 0: all reproduced, 1: something differs or drifted.

    Raises:
        WrongCommand: the command, or the lock, cannot be used.
    """
    given = commands.parse("reproduce", arguments, USAGE, ("--dry-run", "--trust"))
    if not given.names:
        raise commands.WrongCommand(f"`qgrid reproduce` takes {USAGE}, got no lock")
    path = _found(given.names[0], given.out)
    lock = sweep_lock.read(path)
    task = Task(lock, path.absolute().parent, given.out)
    if "--trust" not in given.flags:
        _refuse_foreign(lock)
    _say(show.head(lock))
    found, planned = _differences(task)
    if planned is None:
        return 1
    if "--dry-run" in given.flags:
        return 1 if found else 0
    return _run(task, found, planned)


def _found(name: str, out: Path) -> Path:
    """The file of a lock: as given, in a sweep's folder, or of the sweep of that name."""
    folders = (Path(name), out / "sweeps" / name)
    return next((each / FILE for each in folders if (each / FILE).is_file()), Path(name))


def _refuse_foreign(lock: Lock) -> None:
    """A lock is a file from somebody: what it could do beyond computing must be asked for."""
    wants = [
        f"model `{name}` asks for `{key}`"
        for name, model in lock.parts.models.items()
        for key in ("trust_remote_code", "allow_pickle")
        if getattr(model, key)
    ] + [
        f"runtime `{name}` sends requests to `{runtime.options.get('base_url')}`"
        for name, runtime in lock.parts.runtimes.items()
        if registry.runtime(runtime.name).LOADS.remote
    ]
    if wants:
        raise commands.WrongCommand(
            f"{'; '.join(wants)}; add `--trust` if you trust the author of this lock"
        )


def _differences(
    task: Task,
) -> tuple[list[differences.Difference], dict[str, PlannedCell] | None]:
    """Print what differs; the cells planned again, or None where that is not possible here."""
    lock = task.lock
    cache = HashCache(task.out / "hashes.json")
    facts = Facts(cache)
    folders = [Path.cwd(), task.place, *task.place.parents]
    whole = parts.placed(lock.parts, folders)
    contents, obstacles = inputs.read(whole, cache)
    planned: dict[str, PlannedCell] = {}
    if not obstacles:
        planned, obstacles = _planned(lock, whole, facts)
    cells = [parts.put_together(whole, each.cell) for each in lock.cells.values()]
    here = differences.look(lock, contents, planned, inputs.pins(cells))
    found = differences.between(lock, here)
    _say(*show.differences(found, differences.remarks(lock, here)))
    if obstacles:
        _say(*(f"cannot be run here: {sentence}" for sentence in obstacles))
        return found, None
    return found, planned


def _planned(lock: Lock, whole: Parts, facts: Facts) -> tuple[dict[str, PlannedCell], list[str]]:
    """The cells planned again, or why they cannot be."""
    try:
        return replan.replanned(lock, replan.for_here(whole, facts), facts), []
    except (ValueError, OSError) as error:  # another qgrid's options, or a broken input
        return {}, [" ".join(str(error).split())]


def _run(
    task: Task, found: Sequence[differences.Difference], planned: Mapping[str, PlannedCell]
) -> int:
    """Bring all cells to records, in a store of their own, and compare."""
    _refuse_company(task)
    if (task.sweep / RESULT).is_file():  # that one is finished; an interrupted one goes on
        shutil.rmtree(task.store)
    again = {each.cell_id: each for each in planned.values()}
    settings = Settings(
        name=task.lock.name,
        out=str(task.store),
        rerun=("stale",),
        fresh=False,
        verify=task.lock.verify,
        limits=task.lock.limits,
        tracking=Tracking("none", "qgrid", None),
    )
    sweep.write_plan(list(again.values()), settings)
    code = launchers.launch(task.sweep, launchers.chosen(task.sweep), False)
    if code not in ENDED:
        return code
    known = records.read_all(task.store, again.values())
    if len(known) < len(again):
        _say(f"{len(again) - len(known)} cells have no record yet; the same command goes on")
        return 1
    rerun = sweep_lock.build(task.sweep, list(again.values()), known.values())
    return _report(task, found, _verdicts(task, rerun, planned))


def _refuse_company(task: Task) -> None:
    """Two runs in one store would be one run."""
    for owner in launch.owners(task.sweep).values():
        raise commands.WrongCommand(
            f"process {owner.pid} on {owner.host} is reproducing `{task.lock.name}` already; "
            "wait for it, or give another out=FOLDER"
        )


def _verdicts(
    task: Task, rerun: Lock, planned: Mapping[str, PlannedCell]
) -> dict[str, list[Verdict]]:
    """By the locked cell's id."""
    return {
        cell_id: judgement.cell(
            (task.lock, old),
            (rerun, rerun.cells[planned[cell_id].cell_id]),
            _circumstances(task.lock, old),
        )
        for cell_id, old in task.lock.cells.items()
    }


def _circumstances(lock: Lock, locked: LockedCell) -> Circumstances:
    cell = parts.put_together(lock.parts, locked.cell)
    runtime = registry.runtime(cell.runtime.name)
    remote = runtime.LOADS.remote
    own = getattr(runtime, "deterministic", None)
    exact = not remote if own is None else bool(own(cell))
    return Circumstances(
        exact, not remote and differences.is_elsewhere(cell.gpu, device.describe())
    )


def _report(
    task: Task, found: Sequence[differences.Difference], verdicts: Mapping[str, list[Verdict]]
) -> int:
    """Print and keep the verdicts; the exit code."""
    named = labels(sweep_lock.planned(task.lock))
    for cell_id, each in verdicts.items():
        _say(*show.cell(named[cell_id], each))
    path = task.sweep / RESULT
    kept = {"lock": task.lock.name, "differences": list(map(str, found)), "cells": verdicts}
    write_atomic(path, codec.dumps(kept, indent=1) + "\n")
    _say("", show.summary(verdicts), f"every number: {path}")
    if found:
        _say(f"{len(found)} things differ from the lock, see above")
    judged = [verdict for each in verdicts.values() for verdict in each]
    drifted = any(each.outcome == "drifted" for each in judged)
    return 1 if found or drifted or not judged else 0


def _say(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()
