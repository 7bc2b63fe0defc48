"""`kill -9` at a random moment of a fast grid, then a resume: the same records as undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qgrid.store import records
from qgrid.types import Choice, PlannedCell
from tests.drills import running, same, trivial
from tests.drills.running import Running

LEDGER = "ledger.jsonl"
VICTIMS = ("controller", "controller", "all", "worker", "stage")


@dataclass(frozen=True)
class Undisturbed:
    """The grid as it ends when nobody is killed: how long that took, in how many steps."""

    store: Path
    cells: Sequence[PlannedCell]
    seconds: float
    steps: int


@dataclass(frozen=True)
class Killed:
    """One round: who was killed after how many steps, how much was finished, what came out."""

    victim: str
    steps: int
    finished: int
    faults: tuple[str, ...]


def grid() -> list[Choice]:
    """Three artifacts, one of them the baseline, and two timings of each."""
    return [trivial.choice(bits, load=load) for bits in (16, 8, 4) for load in range(2)]


def undisturbed(place: Path) -> Undisturbed:
    """Run the grid to its end, twice: the first run warms the caches of the system."""
    stores = [place / "first", place / "second"]
    for store in stores:
        folder, cells = trivial.write(grid(), store)
        begin = time.monotonic()
        code = running.finish(folder, **{trivial.LEDGER: str(store / LEDGER)})
        assert code == 0, (folder / "drill.log").read_text()
        seconds = time.monotonic() - begin
    assert same.differences(cells, *stores) == []
    return Undisturbed(stores[1], cells, seconds, len(trivial.ledger(stores[1] / LEDGER)))


def one(source: random.Random, store: Path, wanted: Undisturbed) -> Killed:
    """Kill somebody at a random moment, resume, compare.

    The moment is a number of steps and a bit: what is slow today is not hit more often for it.
    """
    folder, cells = trivial.write(grid(), store)
    victim, steps = source.choice(VICTIMS), source.randint(0, wanted.steps)
    usual = wanted.seconds / 2 / (wanted.steps if steps else 1)  # a step, or the start
    notes = store / LEDGER
    with running.launching(folder, **{trivial.LEDGER: str(notes)}) as first:
        with suppress(running.Ended):
            first.wait_for(lambda: len(trivial.ledger(notes)) >= steps, f"step {steps}")
            first.pause(source.uniform(0.0, 2 * usual))
        victim = _kill(victim, first)
        before = finished(store, cells)
        faults = [*_resumed(folder), *_remaining(first)]
    faults += [
        f"{cell_id} was finished and is another one now"
        for cell_id, text in before.items()
        if finished(store, cells).get(cell_id) != text
    ]
    if not faults:
        faults += same.differences(cells, store, wanted.store)
    return Killed(victim, steps, len(before), tuple(faults))


def finished(store: Path, cells: Sequence[PlannedCell]) -> dict[str, bytes]:
    """The bytes of every record that is final; none of them is torn, whatever it says.

    An `ok` cell whose baseline has failed is not: it could not be compared.
    """
    found = {cell.cell_id: records.load(records.path(store, cell.cell_id)) for cell in cells}
    failed = {each for each, record in found.items() if record and record.status != "ok"}
    return {
        cell.cell_id: records.path(store, cell.cell_id).read_bytes()
        for cell in cells
        if found[cell.cell_id] and not {cell.cell_id, cell.baseline_cell_id} & failed
    }


def _kill(victim: str, run: Running) -> str:
    """Kill the victim, the controller where there is none; who was killed."""
    workers = run.below(run.process.pid)
    stages = [child for worker in workers for child in run.below(worker)]
    chosen = {"worker": workers, "stage": stages}.get(victim, [])
    if victim == "all":
        run.kill_all()
    elif chosen:
        with suppress(ProcessLookupError):
            os.kill(chosen[0], signal.SIGKILL)
        run.wait()
        return victim
    else:
        run.kill()
    return "all" if victim == "all" else "controller"


def _resumed(folder: Path) -> list[str]:
    code = running.finish(folder)
    return [] if code == 0 else [f"the resume ended with {code}"]


def _remaining(run: Running) -> list[str]:
    """Processes of the killed sweep that are still there once the next one has ended."""
    return [f"process {pid} is left over" for pid in run.family() if running.is_alive(pid)]
