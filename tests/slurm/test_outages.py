"""What goes wrong around a launcher: Slurm's commands fail, tasks vanish, plans change."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qgrid import codec
from qgrid import sweep as sweeps
from qgrid.queued import Standing
from qgrid.running import tasks
from qgrid.running.tasks import Task, TaskList
from qgrid.slurm import ends, queue, submissions
from qgrid.slurm.client import TaskState
from qgrid.slurm.queue import Look
from qgrid.slurm.submissions import Submission
from qgrid.store import leases, records
from qgrid.types import PlannedCell
from qgrid.verbs import status
from tests.drills import trivial
from tests.slurm import grids
from tests.slurm.cluster import Layout, Slurm


def written(store: Path, number: int = 2) -> tuple[Path, list[PlannedCell]]:
    """A baseline and as many cells that are compared with it."""
    gpu = grids.here("beta")
    folder, cells = trivial.write(
        [trivial.choice(8, load=each, gpu=gpu) for each in range(number)], store
    )
    return folder, sorted(cells, key=lambda each: each.baseline_cell_id is not None)


def times_submitted(folder: Path, cell: PlannedCell) -> int:
    tasks = [task for each in submissions.read(folder) for task in each.tasks]
    return sum(cell.cell_id in task.cells for task in tasks)


@pytest.fixture
def away(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder: a command of Slurm fails with the text of the file there that has its name."""
    marks, programs = tmp_path / "away", tmp_path / "programs"
    for folder in (marks, programs):
        folder.mkdir()
    for name in ("squeue", "sbatch", "scontrol"):
        real = shutil.which(name, path=slurm.environment["PATH"])
        mark, after = marks / name, marks / f"{name}.after"
        text = (
            f"#!/bin/bash\nif [ -s {after} ]; then n=$(cat {after});"
            f' if [ $n -gt 0 ]; then echo $((n-1)) > {after}; exec {real} "$@"; fi; fi\n'
            f"if [ -e {mark}.slow ]; then sleep $(cat {mark}.slow); fi\n"
            f'if [ -e {mark} ]; then cat {mark} >&2; exit 1; fi\nexec {real} "$@"\n'
        )
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm.environment["PATH"] = f"{programs}:{slurm.environment['PATH']}"
    monkeypatch.setenv("PATH", slurm.environment["PATH"])
    yield marks


@pytest.mark.slow
def test_a_waiting_task_that_is_cancelled_is_not_submitted_again(
    slurm: Slurm, tmp_path: Path
) -> None:
    store = tmp_path / "out"
    folder, (baseline, *cells) = written(store)
    with (
        grids.gate(store, baseline) as gate,
        grids.launching(folder, slurm, cells_per_task=1) as running,
    ):
        slurm.wait(lambda: grids.begins(store, "speed"), f"a timing\n{running.log.read_text()}")
        *_, last = submissions.read(folder)
        time.sleep(1)  # a few looks
        slurm.run("scancel", f"{last.job}_0")
        time.sleep(2)
        gate.unlink()
        code = grids.finish(running, slurm)
        text = running.log.read_text()
    lost = last.tasks[0].cells[0]
    by_id = {each.cell_id: each for each in cells}
    assert code == 1, text
    assert "1 cells were cancelled" in text
    assert times_submitted(folder, by_id[lost]) == 1, text
    assert records.read(store, lost) is None


@pytest.mark.slow
def test_what_never_begins_again_keeps_its_good_record(slurm: Slurm, tmp_path: Path) -> None:
    store = tmp_path / "out"
    folder, cells = written(store, 1)
    with grids.launching(folder, slurm) as running:
        assert grids.finish(running, slurm) == 0, running.log.read_text()
    before = grids.stored(store, cells)
    sweeps.write_plan(cells, trivial.settings(store, rerun=("stale",)))
    with grids.launching(folder, slurm, setup=["exit 3"], attempts=1) as running:
        assert grids.finish(running, slurm) == 1, running.log.read_text()
    assert grids.stored(store, cells) == before


@pytest.mark.slow
@pytest.mark.parametrize("said", ["slurm_load_jobs error: Unexpected message received"])
def test_squeue_fails_for_a_while(slurm: Slurm, tmp_path: Path, away: Path, said: str) -> None:
    store = tmp_path / "out"
    folder, (baseline, *_) = written(store)
    with (
        grids.gate(store, baseline) as gate,
        grids.launching(folder, slurm) as running,
    ):
        slurm.wait(lambda: grids.begins(store, "speed"), f"a timing\n{running.log.read_text()}")
        (away / "squeue").write_text(said)
        slurm.wait(
            lambda: "asking again" in running.log.read_text() or running.process.poll() is not None,
            "a look",
        )
        gate.unlink()
        (away / "squeue").unlink()
        assert grids.finish(running, slurm) == 0, running.log.read_text()


@pytest.mark.slow
def test_squeue_stays_away_and_records_come(slurm: Slurm, tmp_path: Path, away: Path) -> None:
    store = tmp_path / "out"
    folder, (baseline, *_) = written(store)
    with (
        grids.gate(store, baseline) as gate,
        grids.launching(folder, slurm) as running,
    ):
        slurm.wait(lambda: grids.begins(store, "speed"), f"a timing\n{running.log.read_text()}")
        (away / "squeue").write_text("Unable to contact slurm controller")
        gate.unlink()
        slurm.wait(
            lambda: running.process.poll() is not None, f"the end{running.log.read_text()}", 30
        )
        assert running.process.returncode == 0, running.log.read_text()


@pytest.mark.slow
def test_sbatch_fails_when_it_is_asked_again(slurm: Slurm, tmp_path: Path, away: Path) -> None:
    store = tmp_path / "out"
    folder, _ = written(store, 1)
    mark = tmp_path / "second"
    lines = [f"test -e {mark} || sleep 3", f"test -e {mark} || exit 3"]
    with grids.launching(folder, slurm, setup=lines) as running:
        slurm.wait(lambda: "launch " in running.log.read_text(), "the submission")
        (away / "sbatch").write_text("Unable to contact slurm controller")
        slurm.wait(
            lambda: "asking again" in running.log.read_text() or running.process.poll() is not None,
            "a look",
        )
        mark.touch()
        (away / "sbatch").unlink()
        assert grids.finish(running, slurm) == 0, running.log.read_text()


@pytest.mark.slow
def test_the_second_of_three_arrays_is_refused(slurm: Slurm, tmp_path: Path, away: Path) -> None:
    store = tmp_path / "out"
    folder, cells = written(store)
    (away / "sbatch.after").write_text("1")
    (away / "sbatch").write_text("Job violates accounting/QOS policy (job submit limit)")
    with grids.launching(folder, slurm, detach=True) as running:
        assert grids.finish(running, slurm) == 2  # nobody would submit the rest
        assert "4 not submitted" in running.log.read_text()
        slurm.wait_empty()
    with grids.launching(folder, slurm, setup=["sleep 2"]) as running:
        assert grids.finish(running, slurm) == 2  # nothing runs that would make room
    assert not [each for each in submissions.read(folder) if each.job is None]
    (away / "sbatch").unlink()
    with grids.launching(folder, slurm) as running:
        assert grids.finish(running, slurm) == 0, running.log.read_text()
    assert [times_submitted(folder, each) for each in cells] == [1] * len(cells)
    assert len(grids.begins(store, "artifact")) == 2


@pytest.fixture
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Layout:
    """With `slow_end`: after each job its node takes a while."""
    if getattr(request, "param", None) is None:
        return Layout()
    script = tmp_path / "epilog"
    script.write_text("#!/bin/sh\nsleep 3\n")
    script.chmod(0o755)
    return Layout(extra=(f"Epilog={script}",))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["slow_end"], indirect=True)
def test_what_was_cancelled_a_moment_ago_is_resumed(slurm: Slurm, tmp_path: Path) -> None:
    store = tmp_path / "out"
    folder, cells = written(store, 1)
    with (
        grids.gate(store, cells[0]) as gate,
        grids.launching(folder, slurm, detach=True) as detached,
    ):
        assert detached.wait() == 0
        slurm.wait(lambda: grids.begins(store, "speed"), "a timing")
        with grids.qgrid(slurm, store, "cancel", folder.name) as cancel:
            assert cancel.wait() == 0
        assert {state for _, state, _ in slurm.queue()} == {"COMPLETING"}
        gate.unlink()
        with grids.qgrid(slurm, store, "resume", folder.name) as resumed:
            assert grids.finish(resumed, slurm) == 0, resumed.log.read_text()
    assert grids.statuses(store, cells) == ["ok"] * len(cells)


@pytest.mark.slow
def test_a_damaged_record_is_measured_again(slurm: Slurm, tmp_path: Path) -> None:
    store = tmp_path / "out"
    folder, cells = written(store, 1)
    with grids.launching(folder, slurm) as running:
        assert grids.finish(running, slurm) == 0, running.log.read_text()
    file = records.path(store, cells[1].cell_id)
    file.write_bytes(file.read_bytes()[:2000])
    with grids.launching(folder, slurm) as running:
        assert grids.finish(running, slurm) == 0, running.log.read_text()
    assert grids.statuses(store, cells) == ["ok"] * len(cells)
    assert len(list((store / "set_aside").iterdir())) == 1


def test_what_waits_to_run_again_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trivial.install(monkeypatch)
    folder, cells = written(tmp_path / "out", 1)
    name = cells[0].cell_id
    monkeypatch.setenv(leases.JOB, "5_0")
    lease = leases.attempt(leases.of(tmp_path / "out", "cells", name))
    assert lease is not None
    found = {
        word: status.states(folder, [name], {name: Standing(word, "5_0", "BeginTime")})[name].word
        for word in ("running", "queued", "ended")
    }
    lease.release()
    assert found == {
        "running": "running",
        "queued": "queued",
        "ended": "ended without a record",
    }


def test_cells_that_left_the_plan_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trivial.install(monkeypatch)
    store = tmp_path / "out"
    choices = [trivial.choice(8, load=each) for each in range(2)]
    _, old = trivial.write(choices, store)
    folder, new = trivial.write(choices[:1], store)
    listed = Task((), tuple(each.cell_id for each in old))
    gone = Task(("0" * 16,), ("0" * 16,))
    assert tasks.run(folder, TaskList("aaaaaaaaaaaa", 3, (listed, gone)), 0) == 0
    assert tasks.run(folder, TaskList("aaaaaaaaaaaa", 3, (listed, gone)), 1) == 0
    assert len(new) < len(old)
    left = {each.cell_id for each in new}
    for each in old:
        assert (records.read(store, each.cell_id) is not None) == (each.cell_id in left)


def test_a_job_of_another_cluster_is_not_ours(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trivial.install(monkeypatch)
    folder, cells = written(tmp_path / "out", 1)
    job = slurm.run("sbatch", "--parsable", "--array=0-0", "--output=none", "--wrap=sleep 60")
    listed = TaskList("aaaaaaaaaaaa", 3, (Task((), (cells[0].cell_id,)),))
    place = submissions.folder_of(folder, listed.launch)
    place.mkdir(parents=True)
    (place / "001-cells.json").write_text(codec.dumps(listed))
    (place / "001-cells.job").write_text(json.dumps({"job": job.strip()}))
    assert queue.cancel(folder) == []
    assert queue.standing(folder)[cells[0].cell_id].state == "ended"
    assert len(slurm.queue()) == 1


@pytest.mark.slow
def test_cancelling_waits_for_a_launcher_that_submits(
    slurm: Slurm, tmp_path: Path, away: Path
) -> None:
    store = tmp_path / "out"
    folder, _ = written(store)
    (away / "sbatch.slow").write_text("1.5")
    with grids.launching(folder, slurm, setup=["sleep 20"]) as running:
        slurm.wait(slurm.queue, "the first array")
        with grids.qgrid(slurm, store, "cancel", folder.name) as cancel:
            assert cancel.wait() == 0, cancel.log.read_text()
        said = cancel.log.read_text()
        assert grids.finish(running, slurm) == 1, running.log.read_text()
    assert said.count("cancelled job") == 3, said
    assert not slurm.queue()


def test_what_vanished_after_it_waited_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    submission = Submission("b", "001-cells", (Task((), ("c",)), Task((), ("d",))), "12")

    def look(*states: str) -> Look:
        known = {("12", n): TaskState("12", n, word) for n, word in enumerate(states) if word}
        return Look((submission,), known)

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds, cancelled in ((299.0, True), (301.0, False)):
        now[0] = 0.0
        watched = ends.Ends(300.0, look("PENDING", "RUNNING"))
        now[0] = seconds
        gone = look("", "")
        watched.see(gone)
        assert watched.is_cancelled(gone.of(submission, 0)) is cancelled
        assert not watched.is_cancelled(gone.of(submission, 1))
    watched = ends.Ends(300.0, look("COMPLETING", "RUNNING"))
    ended = look("CANCELLED", "CANCELLED")
    watched.see(ended)
    assert [watched.is_cancelled(ended.of(submission, n)) for n in (0, 1)] == [False, True]


@pytest.mark.slow
def test_what_has_no_room_yet_is_submitted_later(slurm: Slurm, tmp_path: Path, away: Path) -> None:
    store = tmp_path / "out"
    folder, cells = written(store)
    (away / "sbatch.after").write_text("2")
    (away / "sbatch").write_text("Job violates accounting/QOS policy (job submit limit)")
    with (
        grids.gate(store, cells[0]) as gate,
        grids.launching(folder, slurm) as running,
    ):
        slurm.wait(lambda: "asking again" in running.log.read_text(), "the refusal")
        slurm.wait(lambda: grids.begins(store, "speed"), "a timing")
        (away / "sbatch").unlink()
        slurm.wait(lambda: len(submissions.read(folder)) == 3, "the rest")
        gate.unlink()
        assert grids.finish(running, slurm) == 0, running.log.read_text()
    assert [times_submitted(folder, each) for each in cells] == [1] * len(cells)
    assert len(grids.begins(store, "artifact")) == 2


def test_the_last_launch_speaks_for_a_cell(tmp_path: Path) -> None:
    for launch, job in (("b", "12"), ("f", "5")):
        place = submissions.folder_of(tmp_path, launch)
        place.mkdir(parents=True)
        listed = TaskList(launch, 3, (Task((), ("c",)),))
        (place / "001-cells.json").write_text(codec.dumps(listed))
        (place / "001-cells.job").write_text(json.dumps({"job": job}))
    states = {
        ("12", 0): TaskState("12", 0, "FAILED"),
        ("5", 0): TaskState("5", 0, "CANCELLED"),
    }
    _, state = Look(tuple(submissions.read(tmp_path)), states).latest()["c"]
    assert state.job == "12"
