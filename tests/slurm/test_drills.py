"""Plugs pulled while a grid runs through a real Slurm: nothing finished is lost, nothing is torn.

Each drill runs the same grid, waits until its slow cell is in the middle of its timing, strikes
there, and lets the launcher or the next one go on. Then every record equals that of a run which
nobody disturbed, and the records that lay there before the strike were not touched.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec
from qgrid.store import records
from qgrid.types import Choice, PlannedCell
from tests.drills import same, trivial
from tests.drills.running import Running
from tests.drills.running import finish as finish_here
from tests.slurm import grids
from tests.slurm.cluster import Layout, Slurm

pytestmark = pytest.mark.slow

TASKS = 3 + 5  # of the grid: artifacts, cells


def grid() -> list[Choice]:
    """Cells on both kinds of cards; the last is the one that is struck."""
    alpha, beta = grids.here("alpha"), grids.here("beta")
    return [*grids.axis(beta, (16, 8)), *grids.axis(alpha, (16, 8, 4))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nobody disturbs, by the local launcher."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    with pytest.MonkeyPatch.context() as patch:
        trivial.install(patch)
        patch.setenv("TMPDIR", str(store.parent))
        folder, _ = trivial.write(grid(), store)
        assert finish_here(folder) == 0
    return store


@dataclass
class Drill:
    """One grid on one cluster, whose last cell waits in the middle of its timing at the gate."""

    slurm: Slurm
    store: Path
    folder: Path
    cells: Sequence[PlannedCell]
    gate: Path
    before: dict[Path, bytes]  # records that were there when the plug was pulled

    @property
    def struck(self) -> PlannedCell:
        """The cell in whose middle the plug is pulled."""
        return self.cells[-1]

    @contextmanager
    def launching(self, **changes: Any) -> Iterator[Running]:
        """The sweep under a launcher, one cell a task, none of which waits for another's timing."""
        own: dict[str, Any] = {"cells_per_task": 1, "apart": "$SLURM_JOB_ID"} | changes
        with grids.launching(self.folder, self.slurm, **own) as running:
            yield running

    def until_struck(self, running: Running) -> dict[str, Any]:
        """Wait until all other cells are done and the last one is in its timing; where that is."""

        def others_are_done() -> bool:
            done = len(grids.stored(self.store, self.cells)) == len(self.cells) - 1
            return done and bool(self.begins())

        self.slurm.wait(others_are_done, f"the timing\n{running.log.read_text()}")
        assert records.read(self.store, self.struck.cell_id) is None
        self.before = grids.stored(self.store, self.cells)
        return self.begins()[-1]

    def finish(self, running: Running) -> int:
        """Let timings go on and wait for the launcher; its exit code."""
        self.gate.unlink(missing_ok=True)
        return grids.finish(running, self.slurm)

    def until_ended(self, place: dict[str, Any]) -> None:
        """Wait until Slurm has ended what ran there, also if it will start it again."""

        def has_ended() -> bool:
            found = [each for each in self.slurm.jobs() if each["JobId"] == place["job"]]
            return not any(each["JobState"] in {"RUNNING", "COMPLETING"} for each in found)

        self.slurm.wait(has_ended, "the end of the task")

    def resume(self) -> None:
        """Go on by the command line, to a good end."""
        with grids.qgrid(self.slurm, self.store, "resume", self.folder.name) as resumed:
            assert self.finish(resumed) == 0, resumed.log.read_text()

    def begins(self) -> list[dict[str, Any]]:
        """The begins of the last cell's timing: where and as which job."""
        name = codec.digest(self.struck.cell)
        return [line for line in grids.begins(self.store, "speed") if line["cell"] == name]

    def assert_nothing_lost(self, undisturbed: Path, begins: int) -> None:
        """All is as undisturbed; the last timing was begun so often, all else once."""
        assert grids.statuses(self.store, self.cells) == ["ok"] * len(self.cells)
        assert not same.differences(self.cells, undisturbed, self.store)
        self.assert_untouched()
        assert len(self.begins()) == begins
        assert len(grids.begins(self.store, "speed")) == len(self.cells) - 1 + begins
        assert len(grids.begins(self.store, "artifact")) == 3

    def assert_untouched(self) -> None:
        """The records that lay there before the strike are the same bytes."""
        assert {file: file.read_bytes() for file in self.before} == self.before


@pytest.fixture
def drill(slurm: Slurm, tmp_path: Path) -> Iterator[Drill]:
    """The grid on the cluster, not launched yet."""
    store = tmp_path / "store"
    folder, cells = trivial.write(grid(), store)
    with grids.gate(store, cells[-1]) as gate:
        yield Drill(slurm, store, folder, cells, gate, {})


# --- machines ------------------------------------------------------------------------------------


def test_a_node_is_lost_in_mid_cell(drill: Drill, slurm: Slurm, undisturbed: Path) -> None:
    with drill.launching() as running:
        place = drill.until_struck(running)
        slurm.lose(place["node"])
        assert drill.finish(running) == 0, running.log.read_text()
    drill.assert_nothing_lost(undisturbed, begins=2)
    first, second = drill.begins()
    assert second["node"] != first["node"]  # the lost one is down


def test_a_node_is_cut_off_and_its_task_goes_on(
    drill: Drill, slurm: Slurm, undisturbed: Path
) -> None:
    with drill.launching() as running:
        place = drill.until_struck(running)
        slurm.cut_off(place["node"])
        slurm.run("scontrol", "update", f"nodename={place['node']}", "state=down", "reason=silent")

        def runs_elsewhere() -> bool:
            slurm.hurry()
            jobs = [each for each in slurm.jobs() if each["JobState"] == "RUNNING"]
            return any(seconds(each) > 2 * float(grids.LEASE_SECONDS) for each in jobs)

        slurm.wait(runs_elsewhere, "a second attempt that waits for the first")
        assert len(drill.begins()) == 1
        assert drill.finish(running) == 0, running.log.read_text()
    drill.assert_nothing_lost(undisturbed, begins=1)


def test_the_cluster_s_controller_restarts(drill: Drill, slurm: Slurm, undisturbed: Path) -> None:
    with drill.launching() as running:
        drill.until_struck(running)
        slurm.restart()
        assert drill.finish(running) == 0, running.log.read_text()
    drill.assert_nothing_lost(undisturbed, begins=1)


# --- jobs ----------------------------------------------------------------------------------------


def test_one_task_is_cancelled(drill: Drill, slurm: Slurm, undisturbed: Path) -> None:
    with drill.launching() as running:
        place = drill.until_struck(running)
        slurm.run("scancel", place["job"])
        drill.until_ended(place)
        assert drill.finish(running) == 1  # somebody did not want it: it is not tried again
        assert len(drill.begins()) == 1
        assert records.read(drill.store, drill.struck.cell_id) is None
    drill.resume()
    drill.assert_nothing_lost(undisturbed, begins=2)


def test_all_is_cancelled(drill: Drill, slurm: Slurm, undisturbed: Path) -> None:
    with drill.launching() as running:
        place = drill.until_struck(running)
        with grids.qgrid(slurm, drill.store, "cancel", drill.folder.name) as cancel:
            assert cancel.wait() == 0, cancel.log.read_text()
        drill.until_ended(place)
        assert drill.finish(running) == 1
    assert not slurm.queue()
    drill.resume()
    drill.assert_nothing_lost(undisturbed, begins=2)


@pytest.mark.parametrize("layout", [Layout(preemption=True)])
def test_a_task_gives_way_to_urgent_work(drill: Drill, slurm: Slurm, undisturbed: Path) -> None:
    with drill.launching(partition="spare") as running:
        place = drill.until_struck(running)
        urgent = ("--partition=urgent", "--gres=gpu:alpha:2", "--array=0-1", "--output=none")
        slurm.run("sbatch", *urgent, "--wrap=sleep 1", cwd=slurm.folder)
        drill.until_ended(place)
        assert drill.finish(running) == 0, running.log.read_text()
    drill.assert_nothing_lost(undisturbed, begins=2)


def test_the_time_limit_ends_in_a_status(drill: Drill, slurm: Slurm) -> None:
    with drill.launching(minutes=1, warn_seconds=50, attempts=2) as running:
        drill.until_struck(running)
        assert grids.finish(running, slurm) == 1  # the gate stays
    *others, last = grids.statuses(drill.store, drill.cells)
    assert last == "timeout", running.log.read_text()
    assert set(others) == {"ok"}
    assert len(drill.begins()) == 2
    record = records.read(drill.store, drill.struck.cell_id)
    assert record is not None
    assert "time limit" in str(record.error)
    drill.assert_untouched()


# --- processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["qgrid.slurm.task", "qgrid.running.worker"])
def test_a_process_of_a_task_is_killed(
    drill: Drill, slurm: Slurm, undisturbed: Path, module: str
) -> None:
    with drill.launching() as running:
        kill(slurm, drill.until_struck(running)["node"], module)
        assert drill.finish(running) == 0, running.log.read_text()
    drill.assert_nothing_lost(undisturbed, begins=2)


def test_the_launcher_is_killed_and_the_next_one_joins(
    drill: Drill, slurm: Slurm, undisturbed: Path
) -> None:
    with drill.launching() as running:
        drill.until_struck(running)
        running.kill()
        with grids.qgrid(slurm, drill.store, "resume", drill.folder.name) as resumed:
            slurm.wait(lambda: "1 queued already" in resumed.log.read_text(), "the next launcher")
            assert drill.finish(resumed) == 0, resumed.log.read_text()
    drill.assert_nothing_lost(undisturbed, begins=1)
    assert len(slurm.jobs()) == TASKS  # nothing was submitted twice


def test_two_launchers_at_once(drill: Drill, slurm: Slurm, undisturbed: Path) -> None:
    with drill.launching() as one, drill.launching() as other:
        drill.until_struck(one)
        codes = [drill.finish(each) for each in (one, other)]
    assert codes == [0, 0], one.log.read_text()
    drill.assert_nothing_lost(undisturbed, begins=1)
    assert len(slurm.jobs()) == TASKS


def kill(slurm: Slurm, node: str, module: str) -> None:
    """`kill -9` of the processes of a node's jobs that run a module."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in slurm.tasks(node)}
    found = [pid for pid, command in commands.items() if module.encode() in command.split(b"\0")]
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def seconds(job: dict[str, str]) -> float:
    """How long a job has run."""
    hours, minutes, rest = job["RunTime"].split(":")
    return 3600 * float(hours) + 60 * float(minutes) + float(rest)
