"""`python -m qgrid status [SWEEP]`: how many cells are where, at a glance at the store.

Of records and plans only the first bytes are read, so that thousands of cells take no second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qgrid import commands, launchers
from qgrid.queued import Standing
from qgrid.running import launch
from qgrid.store import glance, leases, records
from qgrid.verbs import standings

MOST_LINES = 12  # of cells that run
ORDER = ("running", "queued", "ended without a record", "not started")


@dataclass(frozen=True)
class State:
    """One cell: a record's status or a word of `ORDER`; `where` and `why` for those without."""

    word: str
    where: str = ""
    why: str = ""


def main(arguments: list[str]) -> int:
    """Print how far a sweep is; 0.

    Raises:
        commands.WrongCommand: other arguments, or no such sweep.
    """
    given = commands.parse("status", arguments, "[SWEEP] [out=FOLDER]")
    folder = commands.sweep_folder(given)
    queues, silent = standings.of(folder)
    ids = glance.planned_ids(folder / "plan.jsonl")
    found = states(folder, [cell_id for cell_id, _ in ids], queues)
    builds = making(folder, [artifact_id for _, artifact_id in ids])
    told = [*lines(folder, found), *_where("artifact", builds), *_idle(folder, found)]
    for line in [*told, *(f"the queue does not tell: {each}" for each in silent)]:
        print(line)  # noqa: T201
    return 0


def states(
    folder: Path, cell_ids: Sequence[str], queues: Mapping[str, Standing]
) -> dict[str, State]:
    """The state of every planned cell, by id, in the order of the plan."""
    store = folder.parents[1]
    held = _lease_times(store, "cells")
    return {each: _state(store, each, queues.get(each), held.get(each)) for each in cell_ids}


def making(folder: Path, artifact_ids: Iterable[str]) -> dict[str, str]:
    """The artifacts of a plan that are being made, by id, and where."""
    store = folder.parents[1]
    held = _lease_times(store, "artifacts")
    found = {}
    for each in dict.fromkeys(artifact_ids):
        taken = held.get(each)
        if taken is not None and _changed_ns(store / "artifacts" / each) < taken:
            owner = leases.owner(leases.of(store, "artifacts", each))
            if owner is not None:
                found[each] = _place(owner)
    return found


def lines(folder: Path, found: Mapping[str, State]) -> Iterator[str]:
    """What is printed: counts by state, who runs what, what the rest waits for."""
    counts = Counter(state.word for state in found.values())
    yield f"{folder.name} ({launchers.chosen(folder).name}): {len(found)} cells"
    statuses = [word for word, _ in counts.most_common() if word not in ORDER]
    for word in [*statuses, *(word for word in ORDER if counts[word])]:
        reasons = Counter(state.why for state in found.values() if state.word == word and state.why)
        told = ", ".join(f"{why} {count}" for why, count in reasons.most_common())
        yield f"{counts[word]:7} {word}{f' ({told})' if told else ''}"
    running = {cell: state.where for cell, state in found.items() if state.word == "running"}
    yield from _where("cell", running)


def _idle(folder: Path, found: Mapping[str, State]) -> Iterator[str]:
    """How to go on with what nobody works on."""
    words = {state.word for state in found.values()}
    left = words & {"not started", "ended without a record"}
    if left and not words & {"running", "queued"} and not launch.is_running(folder):
        yield f"nobody works on it; `{commands.command('resume', folder)}` goes on"


def _where(what: str, running: Mapping[str, str]) -> Iterator[str]:
    for name, where in list(running.items())[:MOST_LINES]:
        yield f"        running: {what} {name} on {where}"
    if len(running) > MOST_LINES:
        yield f"        and {len(running) - MOST_LINES} more"


def _state(store: Path, cell_id: str, queued: Standing | None, held_ns: int | None) -> State:
    head = glance.head(records.path(store, cell_id))
    if held_ns is not None and (head is None or held_ns > head.changed_ns):
        owner = leases.owner(leases.of(store, "cells", cell_id))
        if owner is not None and not _is_over(owner, queued):
            return State("running", _place(owner))
    if head is not None:  # of a cell that waits for another attempt, too
        return State(head.status or "unreadable")
    if queued is None:
        return State("not started")
    if queued.state == "ended":
        return State("ended without a record", why=queued.why)
    why = "in a running task" if queued.state == "running" else queued.why
    return State("queued", why=why)


def _is_over(owner: leases.Owner, queued: Standing | None) -> bool:
    """Whether the queue knows that the job which holds a lease has ended, or waits to run again."""
    return queued is not None and queued.task == owner.job and queued.state != "running"


def _place(owner: leases.Owner) -> str:
    return f"{owner.host}, {f'process {owner.pid}' if owner.job is None else f'job {owner.job}'}"


def _changed_ns(folder: Path) -> int:
    """When a folder got its last file, by the file system's clock; 0 where there is none."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _lease_times(store: Path, kind: leases.Kind) -> dict[str, int]:
    """When each one was last taken, by the file system's clock."""
    root = store / "leases" / kind
    try:
        return {each.name: each.stat().st_mtime_ns for each in root.iterdir()}
    except FileNotFoundError:
        return {}
