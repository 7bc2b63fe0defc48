"""`kill -9` of a worker, a stage, the controller, the launcher: nothing is lost or left over."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from qgrid import codec
from qgrid.store import records
from qgrid.types import Choice, PlannedCell
from tests.drills import kills, running, same, trivial
from tests.drills.running import Running, launching
from tests.drills.trivial import LEDGER, choice

BUILD_SECONDS = 2.0  # of the artifact whose build is hit; the other cells are done meanwhile or not
ROUNDS, SEED = 20, 5


def grid() -> list[Choice]:
    """A baseline, and two timings of an artifact whose build takes a while."""
    return [choice(16), *(choice(8, pause=BUILD_SECONDS, load=load) for load in range(2))]


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    """A store in which nobody was killed."""
    folder, _ = trivial.write(grid(), tmp_path / "undisturbed")
    assert running.finish(folder) == 0
    return folder.parents[1]


def slow_one(cells: Sequence[PlannedCell]) -> PlannedCell:
    return next(cell for cell in cells if cell.cell.method.options["pause"])


def building(ledger: Path, cells: Sequence[PlannedCell]) -> list[int]:
    """Processes that have begun to build the slow artifact."""
    cell = slow_one(cells).cell
    name = codec.digest([cell.model, cell.method, cell.bits])
    notes = [note for note in trivial.ledger(ledger) if note["cell"] == name]
    return [note["pid"] for note in notes if note["event"] == "begin"]


def in_mid_build(run: Running, ledger: Path, cells: Sequence[PlannedCell], store: Path) -> int:
    """The process that builds the slow artifact, half done."""

    def half() -> bool:
        files = store.glob(f"artifacts/.{slow_one(cells).artifact_id}.*/levels.txt")
        return any(file.stat().st_size for file in files)

    run.wait_for(half, "half an artifact")
    return building(ledger, cells)[-1]


def status(store: Path, cell: PlannedCell) -> str | None:
    record = records.read(store, cell.cell_id)
    return None if record is None else record.status


def asides(store: Path) -> list[Path]:
    return [*(store / "artifacts").glob(".*"), *store.glob("**/.record.json.*")]


def test_a_killed_worker_costs_nothing_but_time(
    store: Path, ledger: Path, undisturbed: Path
) -> None:
    folder, cells = trivial.write(grid(), store)
    with launching(folder, **{LEDGER: str(ledger)}) as run:
        os.kill(running.parent(in_mid_build(run, ledger, cells, store)), signal.SIGKILL)
        assert run.wait() == 0, run.log.read_text()
    assert len(building(ledger, cells)) == 2
    assert same.differences(cells, store, undisturbed) == []
    assert asides(store) == []


def test_a_killed_stage_is_a_crash_of_its_cells_until_the_next_run(
    store: Path, ledger: Path, undisturbed: Path
) -> None:
    folder, cells = trivial.write(grid(), store)
    with launching(folder, **{LEDGER: str(ledger)}) as run:
        os.kill(in_mid_build(run, ledger, cells, store), signal.SIGKILL)
        assert run.wait() == 1, run.log.read_text()
    assert len(building(ledger, cells)) == 1
    for cell in cells:
        is_hit = cell.artifact_id == slow_one(cells).artifact_id
        assert status(store, cell) == ("crashed" if is_hit else "ok")
    before = kills.finished(store, cells)
    assert len(before) == 2

    assert running.finish(folder) == 0
    assert same.differences(cells, store, undisturbed) == []
    assert before.items() <= kills.finished(store, cells).items()
    assert asides(store) == []


def test_a_killed_fresh_build_costs_nobody_the_artifact_that_was_there(
    store: Path, ledger: Path, undisturbed: Path
) -> None:
    folder, cells = trivial.write(grid(), store)
    assert running.finish(folder) == 0
    artifact = store / "artifacts" / slow_one(cells).artifact_id
    before = {file.name: file.read_bytes() for file in artifact.iterdir()}

    trivial.write(grid(), store, fresh=True)
    with launching(folder, **{LEDGER: str(ledger)}) as run:
        stage = in_mid_build(run, ledger, cells, store)
        assert {file.name: file.read_bytes() for file in artifact.iterdir()} == before
        os.kill(stage, signal.SIGKILL)
        assert run.wait() == 1, run.log.read_text()
    assert {file.name: file.read_bytes() for file in artifact.iterdir()} == before

    assert running.finish(folder, **{LEDGER: str(ledger)}) == 0  # and it is not used for this one
    assert len(building(ledger, cells)) == 2
    assert (artifact / "manifest.json").read_bytes() != before["manifest.json"]
    assert same.differences(cells, store, undisturbed) == []
    assert asides(store) == []


def test_what_could_not_be_compared_with_a_killed_baseline_is_compared_by_the_next_run(
    tmp_path: Path, store: Path, ledger: Path
) -> None:
    both = [choice(bits, quality_pause=BUILD_SECONDS / 2) for bits in (16, 8)]
    folder, cells = trivial.write(both, store)
    name = codec.digest(cells[0].cell)  # of the baseline

    def scoring() -> list[int]:
        notes = [note for note in trivial.ledger(ledger) if note["stage"] == "quality"]
        return [note["pid"] for note in notes if note["cell"] == name]

    with launching(folder, **{LEDGER: str(ledger)}) as run:
        run.wait_for(scoring, "the baseline's quality")
        os.kill(scoring()[0], signal.SIGKILL)
        assert run.wait() == 1, run.log.read_text()
    assert [status(store, cell) for cell in cells] == ["crashed", "ok"]

    alone, _ = trivial.write(both, tmp_path / "undisturbed")
    assert [running.finish(each) for each in (folder, alone)] == [0, 0]
    assert same.differences(cells, store, alone.parents[1]) == []


def test_a_killed_controller_leaves_nothing_running_and_loses_nothing(
    store: Path, ledger: Path, undisturbed: Path
) -> None:
    folder, cells = trivial.write(grid(), store)
    with launching(folder, **{LEDGER: str(ledger)}) as run:
        in_mid_build(run, ledger, cells, store)
        run.kill()
        running.patiently(lambda: not run.family(), "the end of what it had started")
        before = kills.finished(store, cells)
        steps = len(trivial.ledger(ledger))
    assert slow_one(cells).cell_id not in before

    assert running.finish(folder, **{LEDGER: str(ledger)}) == 0
    assert same.differences(cells, store, undisturbed) == []
    assert before.items() <= kills.finished(store, cells).items()
    again = {note["cell"] for note in trivial.ledger(ledger)[steps:] if note["stage"] == "speed"}
    assert not again & {codec.digest(c.cell) for c in cells if c.cell_id in before}
    assert asides(store) == []


@pytest.mark.slow
def test_a_killed_command_goes_on_when_it_is_given_again(store: Path, tmp_path: Path) -> None:
    """The whole command line, Hydra and all, with everything below it: the machine goes down."""
    axes = ("bits=16,8,4", f"method.pause=0,{BUILD_SECONDS}", "name=down")
    command = trivial.words(store, *axes)
    with running.started(command, tmp_path / "log") as run:
        run.wait_for(lambda: len(list(store.glob("cells/*/record.json"))) >= 2, "two records")
        run.kill_all()
    before = {file: file.read_bytes() for file in store.glob("cells/*/record.json")}
    assert 2 <= len(before) < 6
    with running.started(command, tmp_path / "log") as run:
        assert run.wait() == 0, run.log.read_text()
    files = list(store.glob("cells/*/record.json"))
    every = [records.load(file) for file in files]
    assert [None if record is None else record.status for record in every] == ["ok"] * 6
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.slow
def test_a_kill_at_a_random_moment_then_a_resume(tmp_path: Path) -> None:
    """20 of the 200 rounds of `tests/benchmarks/bench_kill.py`."""
    wanted = kills.undisturbed(tmp_path)
    source = random.Random(SEED)
    rounds = [kills.one(source, tmp_path / f"{n}" / "outputs", wanted) for n in range(ROUNDS)]
    assert [each for each in rounds if each.faults] == []
    in_the_midst = [each for each in rounds if each.finished < len(wanted.cells)]
    assert len(in_the_midst) > ROUNDS / 2  # else it hit next to nothing
    assert len({each.finished for each in rounds}) > 2
    assert {each.victim for each in rounds} == set(kills.VICTIMS)
