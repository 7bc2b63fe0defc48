"""The launcher's life beside a real Slurm: joining, giving up, refusals, hostile folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec, launchers
from qgrid import sweep as sweeps
from qgrid.running import launch as launches
from qgrid.slurm import client, queue, submissions, watch
from qgrid.slurm.options import Options
from qgrid.slurm.wanted import Wanted
from qgrid.store import records
from qgrid.types import PlannedCell, Record
from tests.drills import trivial
from tests.slurm import grids
from tests.slurm.cluster import Slurm

HOSTILE = "a b'\"$(touch pwned)`id`;&*\n#SBATCH --wrap=true\n~ü"


def written(
    store: Path, numbers: int = 2, pause: float = 0.0, **changes: Any
) -> tuple[Path, list[PlannedCell]]:
    gpu = grids.here("beta")
    choices = [trivial.choice(8, load=n, gpu=gpu, speed_pause=pause) for n in range(numbers)]
    folder, cells = trivial.write(choices, store, **changes)
    return folder, list(cells)


def run(
    folder: Path,
    slurm: Slurm,
    *,
    detach: bool = False,
    lines: Sequence[str] = (),
    **changes: Any,
) -> int:
    options = grids.options(slurm, **changes)
    options["setup"] = [*options["setup"], *lines]
    return launchers.launch(folder, launchers.choose("slurm", options), detach)


def record(folder: Path, planned: PlannedCell) -> Record:
    found = records.read(folder.parents[1], planned.cell_id)
    assert found is not None
    return found


def times_submitted(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in submissions.read(folder):
        for cell in [cell for task in each.tasks for cell in task.cells]:
            found[cell] = found.get(cell, 0) + 1
    return found


@pytest.mark.slow
def test_a_hostile_folder_and_sweep(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGRID_TEST_TOKEN", "s3cr3t-s3cr3t-s3cr3t")
    start = tmp_path / HOSTILE / "start"
    start.mkdir(parents=True)
    monkeypatch.chdir(start)
    folder, cells = written(tmp_path / HOSTILE / "out", 1, name="x$(id) -n'")
    assert run(folder, slurm) == 0
    assert {record(folder, each).status for each in cells} == {"ok"}
    launch = folder / "launches" / record(folder, cells[0]).environment["launch"]
    assert sorted(path.name for path in (launch / "logs").iterdir()) == [
        "001-builds-0.log",
        "001-builds-1.log",
        "002-baselines-0.log",
        "003-cells-0.log",
    ]
    assert not list(tmp_path.rglob("pwned"))
    assert not list(start.iterdir())
    files = [path for path in (tmp_path / HOSTILE / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]


@pytest.mark.parametrize("sign", ["%A", "\\", "%%"])
def test_signs_that_slurm_takes_for_patterns_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sign: str,
) -> None:
    trivial.install(monkeypatch)
    folder, _ = written(tmp_path / f"out{sign}", 1)
    assert watch.run(folder, Options(), False) == 2
    assert "which it takes for a pattern; use `out=FOLDER`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_launcher_joins(slurm: Slurm, tmp_path: Path) -> None:
    folder, cells = written(tmp_path / "out")
    assert run(folder, slurm, detach=True, lines=["sleep 2"]) == 0
    assert run(folder, slurm) == 0
    assert times_submitted(folder) == {each.cell_id: 1 for each in cells}
    assert len({record(folder, each).environment["launch"] for each in cells}) == 1


@pytest.mark.slow
def test_a_launcher_that_died_before_it_knew_the_number(slurm: Slurm, tmp_path: Path) -> None:
    folder, cells = written(tmp_path / "out")
    assert run(folder, slurm, detach=True) == 0
    numbers = sorted(folder.glob("launches/*/*.job"))
    before = [file.read_bytes() for file in numbers]
    for file in numbers:
        file.unlink()
    assert run(folder, slurm) == 0
    assert times_submitted(folder) == {each.cell_id: 1 for each in cells}
    assert [file.read_bytes() for file in numbers] == before


@pytest.mark.slow
def test_what_never_begins_is_given_up_with_the_place_of_its_log(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cells = written(tmp_path / "out", 1)
    assert run(folder, slurm, lines=["echo no such module", "exit 3"], attempts=2) == 1
    assert set(times_submitted(folder).values()) == {2}
    for each in cells:
        failure = record(folder, each).error
        assert failure is not None
        assert failure.status == "crashed"
        assert "ended as FAILED" in failure.message
        assert failure.message.endswith("its last words: no such module")
        log = failure.message.partition("(log: ")[2].partition(")")[0]
        assert "no such module" in Path(log).read_text()
    assert "submitted again" in capsys.readouterr().out
    assert run(folder, slurm) == 0  # another launch tries failures again
    assert {record(folder, each).status for each in cells} == {"ok"}


@pytest.mark.slow
def test_what_is_done_is_not_submitted(slurm: Slurm, tmp_path: Path) -> None:
    folder, cells = written(tmp_path / "out")
    assert run(folder, slurm) == 0
    before = {each.cell_id: record(folder, each) for each in cells}
    assert run(folder, slurm) == 0
    assert times_submitted(folder) == {each.cell_id: 1 for each in cells}
    assert {each.cell_id: record(folder, each) for each in cells} == before
    records.path(folder.parents[1], cells[1].cell_id).unlink()
    assert run(folder, slurm) == 0
    assert times_submitted(folder)[cells[1].cell_id] == 2
    assert sum(times_submitted(folder).values()) == len(cells) + 1
    for file in folder.glob("launches/*/*.job"):
        file.write_text(json.dumps({"job": "999999"}))
    found = queue.standing(folder)  # Slurm has forgotten them
    assert {each.cell_id for each in cells} == set(found)
    assert {(each.state, each.why) for each in found.values()} == {("ended", "has left the queue")}


def test_what_the_plan_refuses_needs_no_job(slurm: Slurm, tmp_path: Path) -> None:
    folder, cells = written(tmp_path / "out", 1)
    refused = [replace(each, status="does_not_fit", reason="too big") for each in cells]
    sweeps.write_plan(refused, trivial.settings(tmp_path / "out"))
    assert run(folder, slurm) == 1  # none is ok
    for each in cells:
        found = record(folder, each)
        assert (found.status, found.error and found.error.message) == ("does_not_fit", "too big")
    assert submissions.read(folder) == []
    assert client.queue() == []


def test_a_store_that_cannot_be_written_to(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = written(tmp_path / "out", 1)
    mounted = ["mount", "--bind", str(tmp_path / "out"), str(tmp_path / "out")]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "out")], check=True)
        options = launchers.choose("slurm", grids.options(slurm)).options
        assert watch.run(folder, codec.convert(Options, options), False) == 1
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)
    assert "cannot be written to (Read-only file system)" in capsys.readouterr().out
    assert client.queue() == []


def test_a_refused_job_is_one_sentence(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cells = written(tmp_path / "out", 1)
    assert run(folder, slurm, partition="nowhere") == 2
    told = capsys.readouterr().err
    assert told.startswith("qgrid: `sbatch` failed: ")
    assert len(told.splitlines()) == 1
    assert submissions.read(folder) == []
    assert client.queue() == []
    assert not any((tmp_path / "out" / "cells" / each.cell_id).exists() for each in cells)


def test_a_cluster_that_is_away_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trivial.install(monkeypatch)
    folder, _ = written(tmp_path / "out", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watch.run(folder, Options(), False) == 2
    assert "hydra/launcher=local" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_the_jobs_go_on(slurm: Slurm, tmp_path: Path) -> None:
    folder, cells = written(tmp_path / "out", 1, pause=2.0)
    with grids.launching(folder, slurm) as running:
        slurm.wait(lambda: "launch " in running.log.read_text(), "the submission")
        os.kill(running.process.pid, signal.SIGINT)
        assert running.wait() == 130
        assert f"qgrid resume {folder.name}" in running.log.read_text()
        slurm.wait_empty()
    assert {record(folder, each).status for each in cells} == {"ok"}


def test_a_record_of_another_version_stops_the_launcher(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cells = written(tmp_path / "out", 1)
    file = records.path(tmp_path / "out", cells[0].cell_id)
    file.parent.mkdir(parents=True)
    file.write_text('{"schema": "qgrid.record/99", "status": "ok"}')
    assert run(folder, slurm) == 2
    assert "qgrid.record/99" in capsys.readouterr().err
    assert submissions.read(folder) == []


def test_what_a_launch_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trivial.install(monkeypatch)
    folder, cells = written(tmp_path / "out")
    words = [("ok", "a"), ("crashed", "a"), ("oom", "b"), ("wrong_device", "b")]
    for each, (status, launch) in zip(cells, words, strict=True):
        file = records.path(tmp_path / "out", each.cell_id)
        file.parent.mkdir(parents=True)
        head = {"schema": "qgrid.record/1", "status": status}
        file.write_text(json.dumps({**head, "environment": {"launch": launch}}))
    quality = tmp_path / "out" / "quality" / cells[0].quality_id  # of the one that is ok
    quality.mkdir(parents=True)
    (quality / "result.json").write_text("{}")
    plain = trivial.settings(tmp_path / "out")
    again = trivial.settings(tmp_path / "out", rerun=("oom",))
    fresh = trivial.settings(tmp_path / "out", fresh=True)

    def wanted(settings: Any, launch: str) -> list[str]:
        found = Wanted(folder, settings, launch).cells(cells)
        status = {each.cell_id: word for each, (word, _) in zip(cells, words, strict=True)}
        return [status[each.cell_id] for each in found]

    assert wanted(plain, "c") == ["crashed", "wrong_device"]
    assert wanted(plain, "a") == ["wrong_device"]
    assert wanted(again, "c") == ["crashed", "oom", "wrong_device"]
    assert wanted(again, "b") == ["crashed"]
    assert wanted(fresh, "c") == ["ok", "crashed", "oom", "wrong_device"]
    (folder / "launches" / "a").mkdir(parents=True)  # of the command that asks: it goes on
    assert wanted(fresh, "c") == ["crashed", "oom", "wrong_device"]
    assert wanted(plain, "c") == ["crashed", "wrong_device"]
    (quality / "result.json").rename(quality / "gone")  # set aside: to be measured again
    assert wanted(plain, "c") == ["ok", "crashed", "wrong_device"]
    (quality / "gone").rename(quality / "result.json")
    launches.planned_anew(folder)
    assert wanted(fresh, "c") == ["ok", "crashed", "oom", "wrong_device"]
    assert sweeps.read_plan(folder / "plan.jsonl") == cells
