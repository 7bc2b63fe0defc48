"""`qgrid status`, `cancel` and `resume`: what they tell and do, without a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import __main__ as command_line
from qgrid import codec, launchers
from qgrid.queued import Standing
from qgrid.running import assembly
from qgrid.running.tasks import Task, TaskList
from qgrid.store import glance, leases, records
from qgrid.types import PlannedCell, Prose, Slices, Status
from qgrid.verbs import standings, status
from tests.drills import trivial
from tests.drills.running import Running, started


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[PlannedCell]]:
    """A planned sweep of six cells."""
    trivial.install(monkeypatch)
    folder, cells = trivial.write([trivial.choice(8, load=n) for n in range(3)], tmp_path / "out")
    assert len(cells) == 6
    return folder, list(cells)


def finished(folder: Path, planned: PlannedCell, word: Status) -> None:
    record = replace(assembly.refused(planned, word, "why", {}), error=None)
    records.write(folder.parents[1], record)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = command_line.main(list(words))
    told = capsys.readouterr()
    return code, told.out + told.err


def queues(monkeypatch: pytest.MonkeyPatch, found: dict[str, Standing]) -> None:
    monkeypatch.setattr(standings, "of", lambda _: (found, []))


def test_each_cell_is_counted_once_by_where_it_is(
    sweep: tuple[Path, list[PlannedCell]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, cells = sweep
    store = folder.parents[1]
    ids = [each.cell_id for each in cells]
    finished(folder, cells[0], "ok")
    finished(folder, cells[1], "oom")
    queues(
        monkeypatch,
        {
            ids[0]: Standing("ended", "7_0", "COMPLETED", "n1"),
            ids[2]: Standing("running", "7_1", "RUNNING", "n1"),
            ids[3]: Standing("queued", "7_2", "Priority"),
            ids[4]: Standing("ended", "7_3", "NODE_FAIL", "n2"),
        },
    )
    monkeypatch.setenv(leases.JOB, "7_1")
    with leases.held(leases.of(store, "cells", ids[2])):
        code, text = said(capsys, "status", f"out={store}")
    assert code == 0
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "trivial (local): 6 cells"
    assert set(lines[1:7]) == {
        "1 ok",
        "1 oom",
        "1 running",
        "1 queued (Priority 1)",
        "1 ended without a record (NODE_FAIL 1)",
        "1 not started",
    }
    assert lines[7] == f"running: cell {ids[2]} on {os.uname().nodename}, job 7_1"
    assert sum(int(line.split()[0]) for line in lines[1:7]) == 6


def test_a_dead_owner_runs_nothing(
    sweep: tuple[Path, list[PlannedCell]],
) -> None:
    folder, cells = sweep
    lease = leases.of(folder.parents[1], "cells", cells[0].cell_id)
    take = (
        "import sys; from pathlib import Path; from qgrid.store import leases; "
        "leases.attempt(Path(sys.argv[1]))"
    )
    # it ends and gives nothing back
    subprocess.run([sys.executable, "-c", take, lease], check=True)
    assert _words(folder)[cells[0].cell_id] == "not started"


def test_a_lost_job_runs_nothing_though_its_lease_is_there(
    sweep: tuple[Path, list[PlannedCell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cells = sweep
    cell_id = cells[0].cell_id
    monkeypatch.setenv(leases.JOB, "9_4")
    with leases.held(leases.of(folder.parents[1], "cells", cell_id)):
        gone = {cell_id: Standing("ended", "9_4", "NODE_FAIL")}
        assert _words(folder, gone)[cell_id] == "ended without a record"
        moved = {cell_id: Standing("ended", "9_9", "NODE_FAIL")}
        assert _words(folder, moved)[cell_id] == "running"


def test_a_cell_that_is_measured_again_runs(sweep: tuple[Path, list[PlannedCell]]) -> None:
    folder, cells = sweep
    store = folder.parents[1]
    place = leases.of(store, "cells", cells[0].cell_id)
    with leases.held(place):
        finished(folder, cells[0], "ok")
    assert _words(folder)[cells[0].cell_id] == "ok"
    record = records.path(store, cells[0].cell_id)
    os.utime(record, ns=(1, 1))
    with leases.held(place):
        assert _words(folder)[cells[0].cell_id] == "running"
    assert _words(folder)[cells[0].cell_id] == "ok"


def test_a_torn_record_is_shown(sweep: tuple[Path, list[PlannedCell]]) -> None:
    folder, cells = sweep
    finished(folder, cells[0], "ok")
    records.path(folder.parents[1], cells[0].cell_id).write_text('{"schema"')
    assert _words(folder)[cells[0].cell_id] == "unreadable"


def test_an_artifact_in_the_making_is_shown(
    sweep: tuple[Path, list[PlannedCell]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cells = sweep
    store = folder.parents[1]
    artifact = cells[0].artifact_id
    with leases.held(leases.of(store, "artifacts", artifact)):
        _, text = said(capsys, "status", "trivial", f"out={store}")
    assert f"running: artifact {artifact} on {os.uname().nodename}" in text


def test_a_glance_agrees_with_the_whole_record(sweep: tuple[Path, list[PlannedCell]]) -> None:
    folder, cells = sweep
    words: tuple[Status, ...] = ("ok", "oom", "crashed", "wrong_device", "timeout", "unsupported")
    for each, word in zip(cells, words, strict=True):
        finished(folder, each, word)
        file = records.path(folder.parents[1], each.cell_id)
        head, whole = glance.head(file), records.load(file)
        assert head is not None
        assert whole is not None
        assert (head.schema, head.status) == (whole.schema, whole.status) == (whole.schema, word)
    ids = [(each.cell_id, each.artifact_id) for each in cells]
    assert glance.planned_ids(folder / "plan.jsonl") == ids


@pytest.mark.parametrize("verb", ["status", "resume", "cancel"])
def test_wrong_commands_are_told(
    sweep: tuple[Path, list[PlannedCell]], capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    store = sweep[0].parents[1]
    for words, told in (
        (["--all"], "got `--all"),
        (["a", "b"], "got `a b"),
        (["other"], "no sweep `other`"),
    ):
        code, text = said(capsys, verb, *words, f"out={store}")
        assert code == 2
        assert told in text
        assert len(text.splitlines()) == 1


def test_cancel_wants_a_name(
    sweep: tuple[Path, list[PlannedCell]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(capsys, "cancel", f"out={sweep[0].parents[1]}")
    assert (code, "got no name" in text) == (2, True)


def test_cancel_of_a_sweep_that_does_not_run(
    sweep: tuple[Path, list[PlannedCell]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(capsys, "cancel", "trivial", f"out={sweep[0].parents[1]}")
    assert (code, text) == (0, "nothing of it runs or waits\n")


def test_cancel_where_a_queue_cannot_be_asked(
    sweep: tuple[Path, list[PlannedCell]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder, cells = sweep
    tasks = TaskList("0123456789ab", 3, (Task((), (cells[0].cell_id,)),))
    place = folder / "launches" / tasks.launch
    place.mkdir(parents=True)
    (place / "001-cells.json").write_text(codec.dumps(tasks))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = said(capsys, "cancel", "trivial", f"out={folder.parents[1]}")
    assert code == 1
    assert "not cancelled: this machine has no `squeue`" in text
    code, text = said(capsys, "status", "trivial", f"out={folder.parents[1]}")
    assert code == 0
    assert "6 not started" in text
    assert "the queue does not tell: this machine has no `squeue`" in text


@pytest.mark.slow
def test_cancel_ends_a_local_sweep_and_resume_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trivial.install(monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the locks of the machine lie there
    monkeypatch.setattr(tempfile, "tempdir", None)
    store = tmp_path / "out"
    ledger = tmp_path / "ledger"
    choices = [trivial.choice(8, load=n, speed_pause=1.5) for n in range(2)]
    folder, cells = trivial.write(choices, store)
    variables = trivial.variables(**{trivial.LEDGER: str(ledger)})
    with started(trivial.command(folder), tmp_path / "log", variables) as running:
        _wait(running, lambda: len(list(store.glob("cells/*/record.json"))) >= 1)
        code, text = said(capsys, "cancel", "trivial", f"out={store}")
        assert (code, text) == (0, f"process {running.process.pid} was told to end\n")
        assert running.wait() == 130
    before = {file: file.read_bytes() for file in store.glob("cells/*/record.json")}
    assert len(before) < len(cells)
    code, _ = said(capsys, "resume", "trivial", f"out={store}")
    assert code == 0
    assert set(_words(folder).values()) == {"ok"}
    assert {file: file.read_bytes() for file in before} == before


def test_resume_uses_the_launcher_and_its_options(
    sweep: tuple[Path, list[PlannedCell]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = sweep
    asked: list[Any] = []
    from qgrid.launchers import slurm

    def launch(*given: Any) -> int:
        asked.append(given)
        return 5

    monkeypatch.setattr(slurm, "launch", launch)
    launchers.launch(folder, launchers.choose("slurm", {"account": "proj"}), False)
    code, _ = said(capsys, "resume", "--detach", f"out={folder.parents[1]}")
    assert code == 5
    assert asked[1] == (folder, slurm.Options(account="proj"), True)


def test_resume_finds_relative_paths_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trivial.install(monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    start, own, away = (tmp_path / name for name in ("start", "own", "away"))
    for each in (start, own, away):
        each.mkdir()
    (own / "own.txt").write_text((trivial.FOLDER / "prose.txt").read_text())
    (start / "own.jsonl").write_text((trivial.FOLDER / "colours.jsonl").read_text())
    item = replace(trivial.SLICES.items["colours"], path="own.jsonl")
    slices = Slices("own", Prose("own.txt", None), {"colours": item})
    monkeypatch.chdir(start)
    monkeypatch.setenv("QGRID_CONFIG_DIR", str(own))
    store = tmp_path / "out"
    folder, cells = trivial.write([replace(trivial.choice(), slices=slices)], store)
    assert launchers.launch(folder, launchers.chosen(folder), False) == 0
    records.path(store, cells[0].cell_id).unlink()
    shutil.rmtree(store / "quality")
    monkeypatch.chdir(away)
    monkeypatch.delenv("QGRID_CONFIG_DIR")
    code, text = said(capsys, "resume", "trivial", f"out={store}")
    monkeypatch.setenv("QGRID_CONFIG_DIR", "")  # what the command has set ends with the test
    assert code == 0, text
    assert set(_words(folder).values()) == {"ok"}


def _words(folder: Path, found: dict[str, Standing] | None = None) -> dict[str, str]:
    ids = [cell_id for cell_id, _ in glance.planned_ids(folder / "plan.jsonl")]
    return {key: each.word for key, each in status.states(folder, ids, found or {}).items()}


def _wait(running: Running, condition: Callable[[], object]) -> None:
    while not condition():
        running.pause(0.02)
