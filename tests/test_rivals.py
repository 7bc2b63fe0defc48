"""Launches that meet in one store: neither undoes, repeats nor gives up what the other one does."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import codec, files
from qgrid.running import assembly, attempts, machine, pipeline
from qgrid.running.controller import Sweep
from qgrid.running.progress import Progress
from qgrid.running.stopping import Stop, Stopped
from qgrid.running.tasks import Task, TaskList
from qgrid.store import leases, records
from qgrid.types import Gpu, Job, PlannedCell
from qgrid.weights import artifacts
from tests import faults
from tests.drills import trivial
from tests.drills.once import assert_each_once
from tests.drills.running import launching
from tests.drills.trivial import LEDGER, choice
from tests.running.test_tasks import in_stage, run, start


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trivial.install(monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # locks of this machine that nobody else holds
    monkeypatch.setattr("qgrid.files.machine_locks", lambda: tmp_path / "machine")
    monkeypatch.setenv(LEDGER, str(tmp_path / "ledger"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def meanwhile(sweep: Sweep, act: Callable[[], object]) -> None:
    """Let something happen once the sweep has looked at its records."""
    opened = sweep.progress.open

    def open_(num_to_run: int) -> None:
        act()
        opened(num_to_run)

    sweep.progress.open = open_  # type: ignore[method-assign]


def stranger(folder: Path) -> Path:
    """Take a lease over, as an owner of another machine that believed this one to be dead."""
    highest = max(int(path.name) for path in folder.iterdir())
    owner = {"token": "t", "host": "far", "boot": "other", "pid": 1, "started": "1"}
    file = folder / str(highest + 1)
    file.write_text(json.dumps(owner) + "\n")
    return file


def test_who_waits_for_a_build_neither_counts_it_nor_gives_it_up(
    store: Path, tmp_path: Path
) -> None:
    folder, cells = trivial.write([choice(4, pause=3.0)], store)
    artifact = cells[1].artifact_id
    listed = TaskList("one", 2, (Task((artifact,), ()),))
    builds = store / "builds" / artifact
    first = start(folder, listed)
    in_stage(tmp_path / "ledger", "artifact")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = start(folder, listed)
    in_stage(tmp_path / "ledger", "artifact", 2)
    waiting = start(folder, listed)
    assert [each.wait(faults.SECONDS) for each in (second, waiting)] == [0, 0]
    for each in (second, waiting):
        each.communicate()
    lines = [json.loads(line) for line in (builds / attempts.FILE).read_text().split("\n") if line]
    assert ["host" in line for line in lines] == [True, True, False]
    result = records.load_result(builds / "result.json")
    assert result is not None
    assert result.failure is None


def test_a_build_that_was_given_up_stays_so(store: Path, tmp_path: Path) -> None:
    folder, cells = trivial.write([choice(4, pause=600.0)], store)
    listed = TaskList("one", 1, (Task((cells[1].artifact_id,), ()),))
    first = start(folder, listed)
    in_stage(tmp_path / "ledger", "artifact")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert run(folder, listed)[0] == 0
    whole = TaskList("one", 1, (Task((), (cells[1].cell_id,)),))
    assert run(folder, whole)[0] == 0
    record = records.read(store, cells[1].cell_id)
    assert record is not None
    assert record.status == "crashed"
    assert "1 attempts gave no result" in str(record.error)


def test_what_the_right_device_writes_meanwhile_is_not_overwritten(store: Path) -> None:
    card = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)
    folder, cells = trivial.write([choice(4, gpu=card)], store)
    sweep = Sweep(cells, trivial.settings(store), folder, Progress(cells, io.StringIO()))

    def finish(cell: PlannedCell) -> None:
        record = assembly.refused(cell, "crashed", "", {"fingerprint": "there", "launch": "other"})
        records.write(store, replace(record, status="ok", error=None))

    meanwhile(sweep, lambda: finish(cells[0]))
    sweep.run()
    found = records.read_all(store, cells)
    assert found[cells[0].cell_id].status == "ok"
    assert sweep.records[cells[0].cell_id].status == "ok"
    assert all(found[each.cell_id].status == "wrong_device" for each in cells[1:])


def test_what_another_machine_measures_is_not_refused_here(store: Path) -> None:
    card = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)
    folder, cells = trivial.write([choice(4, gpu=card)], store)
    lease = leases.attempt(leases.of(store, "cells", cells[0].cell_id))
    assert lease is not None
    sweep = Sweep(cells, trivial.settings(store), folder, Progress(cells, io.StringIO()))
    sweep.run()
    assert records.read(store, cells[0].cell_id) is None
    assert sweep.records[cells[0].cell_id].status == "wrong_device"


@pytest.mark.parametrize("ahead", [True, False], ids=["build", "cell"])
def test_a_build_that_another_one_has_taken_over_is_no_end_of_its_cells(
    store: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    folder, cells = trivial.write([choice(16)], store)
    stages = pipeline.Pipeline._stage
    taken: list[Path] = []

    def stage(self: pipeline.Pipeline, name: str, *more: object) -> object:
        if name == "artifact" and not taken:
            taken.append(stranger(leases.of(store, "artifacts", cells[0].artifact_id)))
            threading.Timer(1.0, lambda: taken[0].write_text("x")).start()
        return stages(self, name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline.Pipeline, "_stage", stage)
    if not ahead:
        monkeypatch.setattr("qgrid.running.schedule.needed", lambda *_: [])
    sweep = Sweep(cells, trivial.settings(store), folder, Progress(cells, io.StringIO()))
    sweep.run()
    assert taken
    record = records.read(store, cells[0].cell_id)
    assert record is not None
    assert (record.status, record.error) == ("ok", None)


def test_a_launcher_that_joins_a_fresh_sweep_makes_nothing_twice(
    store: Path, tmp_path: Path
) -> None:
    grid = [choice(8, number=number, pause=0.4, quality_pause=0.2) for number in range(6)]
    folder, cells = trivial.write(grid, store, fresh=True)
    with contextlib.ExitStack() as both:
        first = both.enter_context(launching(folder))
        first.wait_for(lambda: list(store.glob("cells/*/record.json")), "a record")
        second = both.enter_context(launching(folder))
        assert [run.wait() for run in (first, second)] == [0, 0], first.log.read_text()
    assert_each_once(tmp_path / "ledger", cells)


def test_a_task_that_only_builds_makes_every_artifact(store: Path, tmp_path: Path) -> None:
    folder, cells = trivial.write([choice(4), choice(8)], store)
    wanted = tuple(cell.artifact_id for cell in cells)
    code, output = run(folder, TaskList("one", 2, (Task(wanted, ()),)))
    assert code == 0, output
    assert {path.name for path in (store / "artifacts").iterdir()} == set(wanted)
    assert not records.read_all(store, cells)


def test_a_task_measures_the_baseline_that_nobody_has_measured(store: Path) -> None:
    folder, cells = trivial.write([choice(4)], store)
    compared = next(cell for cell in cells if cell.baseline_cell_id is not None)
    code, output = run(folder, TaskList("one", 2, (Task((), (compared.cell_id,)),)))
    assert code == 0, output
    record = records.read(store, compared.cell_id)
    assert record is not None
    assert record.status == "ok", record.error
    assert "flips_worse" in {each.metric for each in record.measurements}


def test_the_same_command_again_joins_the_fresh_one_that_runs(store: Path, tmp_path: Path) -> None:
    grid = [choice(8, number=number, pause=0.3) for number in range(5)]
    folder, cells = trivial.write(grid, store, fresh=True)
    with contextlib.ExitStack() as both:
        first = both.enter_context(launching(folder))
        first.wait_for(lambda: list(store.glob("cells/*/record.json")), "a record")
        trivial.write(grid, store, fresh=True)  # as the command does before it launches
        second = both.enter_context(launching(folder))
        assert [run.wait() for run in (first, second)] == [0, 0], first.log.read_text()
    assert_each_once(tmp_path / "ledger", cells)
    trivial.write(grid, store, fresh=True)
    before = len(trivial.ledger(tmp_path / "ledger"))
    with launching(folder) as third:  # nobody runs any more: it asks for all of it anew
        assert third.wait() == 0
    assert len(trivial.ledger(tmp_path / "ledger")) == 2 * before


def test_a_stop_does_not_wait_for_the_hash_of_a_large_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)  # a quarter of an hour, at the least
    stop = Stop()
    threading.Timer(0.3, lambda: stop.set("SIGTERM")).start()
    with pytest.raises(Stopped):
        files.HashCache(tmp_path / "hashes.json", stop.check).sha256(file)


def test_hashes_that_others_have_remembered_since_are_kept(tmp_path: Path) -> None:
    one, other = (files.HashCache(tmp_path / "hashes.json") for _ in range(2))
    for number, cache in enumerate((one, other)):
        (tmp_path / str(number)).write_text("x")
        cache.sha256(tmp_path / str(number))
    known = json.loads((tmp_path / "hashes.json").read_text())
    assert {Path(name).name for name in known} == {"0", "1"}


def test_an_artifact_is_verified_while_no_timing_runs(store: Path) -> None:
    folder, cells = trivial.write([choice(16)], store)
    sweep = Sweep(cells, trivial.settings(store), folder, Progress(cells, io.StringIO()))
    sweep.run()
    records.path(store, cells[0].cell_id).unlink()
    again = Sweep(cells, trivial.settings(store), folder, Progress(cells, io.StringIO()))
    verified: list[str] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as timing:
        verify = artifacts.verify

        def noted(*given: object, **named: object) -> object:
            verified.append("now")
            return verify(*given, **named)  # type: ignore[arg-type]

        patch.setattr(artifacts, "verify", noted)
        timing.enter_context(machine.hold(alone=True))
        running = threading.Thread(target=again.run)
        running.start()
        running.join(1.0)
        assert verified == []
        timing.close()
        running.join(faults.SECONDS)
        assert verified


def test_a_stage_that_nobody_waits_for_any_more_does_not_begin(store: Path) -> None:
    folder, cells = trivial.write([choice(16)], store)
    out = store / "out"
    job = Job(
        stage="artifact",
        planned=cells[0],
        artifact=str(store / "artifacts" / "a"),
        baseline=None,
        out=str(out),
        store=str(store),
        verify="cached",
    )
    file = folder / "job.json"
    file.write_text(codec.dumps(job))
    for hears in (False, True):
        worker = subprocess.Popen(
            [sys.executable, "-m", "qgrid.running.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=trivial.variables(),
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        if not hears:
            worker.stdout.close()
        worker.stdin.write(json.dumps(str(file)).encode() + b"\n")
        worker.stdin.flush()
        if hears:
            assert worker.stdout.readline().startswith(b"started")
            assert worker.stdout.readline().startswith(b"ended")
        worker.stdin.close()
        assert worker.wait(faults.SECONDS) == 0
        worker.stdout.close()
        assert out.exists() == hears
