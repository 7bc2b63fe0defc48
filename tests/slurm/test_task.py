"""One task of an array, outside a job: what it does with its arguments and its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qgrid import codec
from qgrid.running import tasks
from qgrid.running.tasks import Task, TaskList
from qgrid.slurm import client, task
from qgrid.store import leases, records
from qgrid.types import PlannedCell
from tests.drills import trivial

LAUNCH = "0123456789ab"


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PlannedCell]:
    """The tasks of a launch: one, with the 16-bit cell."""
    trivial.install(monkeypatch)
    for name in (leases.LAUNCH, leases.JOB, "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.setenv(name, "")  # what the task sets ends with the test
        monkeypatch.delenv(name)
    folder, cells = trivial.write([trivial.choice()], tmp_path / "out")
    file = folder / "launches" / LAUNCH / "001-cells.json"
    file.parent.mkdir(parents=True)
    file.write_text(codec.dumps(TaskList(LAUNCH, 2, (Task((), (cells[0].cell_id,)),))))
    return file, cells[0]


def test_it_brings_its_cell_to_a_record(listed: tuple[Path, PlannedCell]) -> None:
    file, planned = listed
    assert task.main([str(file), "0"]) == 0
    record = records.read(file.parents[4], planned.cell_id)
    assert record is not None
    assert (record.status, record.environment["launch"]) == ("ok", LAUNCH)


@pytest.mark.parametrize(
    ("code", "state", "asked"),
    [
        (tasks.AGAIN, "RUNNING", ["12_0"]),
        (tasks.AGAIN, "CANCELLED", []),  # somebody did not want it
        (tasks.AGAIN, "COMPLETING", []),  # under way already
        (tasks.AGAIN, None, []),
        (0, "RUNNING", []),
        (1, "RUNNING", []),
    ],
)
def test_it_asks_to_be_started_again_where_nobody_else_does(
    listed: tuple[Path, PlannedCell],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    state: str | None,
    asked: list[str],
) -> None:
    requeued: list[str] = []
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setattr(tasks, "run", lambda *_: code)
    monkeypatch.setattr(client, "state", lambda _: state)
    monkeypatch.setattr(client, "requeue", requeued.append)
    assert task.main([str(listed[0]), "0"]) == code
    assert requeued == asked
    assert (os.environ[leases.LAUNCH], os.environ[leases.JOB]) == (LAUNCH, "12_0")


def test_a_cluster_that_does_not_start_it_again_costs_a_line(
    listed: tuple[Path, PlannedCell],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(_: str) -> None:
        raise client.SlurmError("no requeue here")

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setattr(tasks, "run", lambda *_: tasks.AGAIN)
    monkeypatch.setattr(client, "state", lambda _: "RUNNING")
    monkeypatch.setattr(client, "requeue", refuse)
    assert task.main([str(listed[0]), "0"]) == tasks.AGAIN
    assert capsys.readouterr().err == "qgrid: no requeue here\n"


@pytest.mark.parametrize("text", [None, "{", '{"launch": "x"}'])
def test_tasks_that_cannot_be_read_are_one_line(
    listed: tuple[Path, PlannedCell], capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    file = listed[0]
    file.unlink()
    if text is not None:
        file.write_text(text)
    assert task.main([str(file), "0"]) == 1
    said = capsys.readouterr().err
    assert str(file) in said
    assert len(said.splitlines()) == 1
