"""Tasks of a remote launcher, in processes of their own: ended, killed, given up, never twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qgrid import codec
from qgrid.running import attempts, tasks
from qgrid.running.tasks import Task, TaskList
from qgrid.store import records
from qgrid.types import Gpu, PlannedCell
from tests import faults
from tests.drills import trivial

RUN = """
import sys
from pathlib import Path
from qgrid import codec
from qgrid.running import tasks
folder, listed, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.exit(tasks.run(folder, codec.loads(tasks.TaskList, listed), index))
"""


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trivial.install(monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # locks of this machine that nobody else holds
    monkeypatch.setenv(trivial.LEDGER, str(tmp_path / "ledger"))


def start(folder: Path, listed: TaskList, index: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), codec.dumps(listed), str(index)],
        stdout=subprocess.PIPE,
        text=True,
        env=trivial.variables(),
    )


def run(folder: Path, listed: TaskList, index: int = 0) -> tuple[int, str]:
    process = start(folder, listed, index)
    output, _ = process.communicate(timeout=faults.SECONDS)
    return process.returncode, output


def one_task(cells: Sequence[PlannedCell], launch: str = "one", limit: int = 2) -> TaskList:
    ids = tuple(cell.cell_id for cell in cells)
    return TaskList(launch, limit, (Task((), ids),))


def in_stage(ledger: Path, stage: str, number: int = 1) -> None:
    faults.wait_for(
        lambda: (
            sum(
                line["stage"] == stage and line["event"] == "begin"
                for line in trivial.ledger(ledger)
            )
            >= number
        ),
        f"{stage} to begin",
    )


def test_tasks_make_their_artifacts_and_records_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    folder, cells = trivial.write([trivial.choice(4), trivial.choice(4, load=1)], store)
    artifacts = tuple(dict.fromkeys(cell.artifact_id for cell in cells))
    ids = tuple(cell.cell_id for cell in cells)
    listed = TaskList("one", 2, (Task(artifacts, ()), Task((), ids[:1]), Task((), ids[1:])))
    assert [run(folder, listed, index)[0] for index in range(3)] == [0, 0, 0]
    assert run(folder, listed, 2)[0] == 0  # a requeued task finds its work done
    found = records.read_all(store, cells)
    assert {record.status for record in found.values()} == {"ok"}
    assert {record.environment["launch"] for record in found.values()} == {"one"}
    built = [line for line in trivial.ledger(tmp_path / "ledger") if line["stage"] == "artifact"]
    assert len(built) == 2 * len(artifacts)  # each began and ended once
    assert "flips_worse" in {each.metric for each in found[ids[-1]].measurements}


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, attempts.TIME_LIMIT)]
)
def test_a_task_that_is_told_to_end_goes_on_next_time(
    tmp_path: Path, number: signal.Signals, why: str
) -> None:
    store = tmp_path / "store"
    folder, cells = trivial.write([trivial.choice(16, speed_pause=600.0)], store)
    process = start(folder, one_task(cells))
    in_stage(tmp_path / "ledger", "speed")
    process.send_signal(number)
    process.communicate(timeout=faults.SECONDS)
    assert process.returncode == tasks.AGAIN
    assert records.read(store, cells[0].cell_id) is None
    kept = attempts.earlier(store / "cells" / cells[0].cell_id, "one")
    assert (kept.count, kept.why) == (1, why)


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGUSR1, "timeout", "2 attempts gave no result"),
        (signal.SIGKILL, "crashed", "node lost or killed"),
    ],
)
def test_after_so_many_attempts_a_cell_is_given_up(
    tmp_path: Path, number: signal.Signals, status: str, words: str
) -> None:
    store = tmp_path / "store"
    folder, cells = trivial.write([trivial.choice(16, speed_pause=600.0)], store)
    for attempt in (1, 2):
        process = start(folder, one_task(cells))
        in_stage(tmp_path / "ledger", "speed", attempt)
        process.send_signal(number)
        process.communicate(timeout=faults.SECONDS)
    assert run(folder, one_task(cells))[0] == 0
    record = records.read(store, cells[0].cell_id)
    assert record is not None
    assert record.status == status
    assert words in str(record.error)
    assert run(folder, one_task(cells))[0] == 0  # and stays so in this launch
    again = start(folder, one_task(cells, launch="two"))  # another one tries anew
    in_stage(tmp_path / "ledger", "speed", 3)
    again.terminate()
    again.communicate(timeout=faults.SECONDS)


def test_an_artifact_that_failed_is_not_tried_by_the_next_task(tmp_path: Path) -> None:
    faulty = tmp_path / "model"
    faulty.mkdir()
    (faulty / "config.json").write_text(json.dumps({"model_type": "llama"}))
    store = tmp_path / "store"
    with pytest.MonkeyPatch.context() as patch:
        faults.install(patch)
        cells = [
            faults.planned(faults.cell(faulty, "raise", outputs=outputs, runtime="light"))
            for outputs in (2, 3)
        ]
        folder = faults.folder(store)
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(codec.dumps(faults.settings(store)))
        (folder / "plan.jsonl").write_text("".join(f"{codec.dumps(each)}\n" for each in cells))
        ids = [cell.cell_id for cell in cells]
        listed = TaskList("one", 3, tuple(Task((), (each,)) for each in ids))
        assert run(folder, listed, 0)[0] == 0
        log = store / "builds" / cells[0].artifact_id / "log.txt"
        before = log.stat().st_mtime_ns
        assert run(folder, listed, 1)[0] == 0
        assert log.stat().st_mtime_ns == before
        found = records.read_all(store, cells)
        assert {record.status for record in found.values()} == {"crashed"}
        assert len({str(record.error) for record in found.values()}) == 1
        assert run(folder, TaskList("two", 3, listed.tasks), 1)[0] == 0
        assert log.stat().st_mtime_ns != before  # another launch tries again


def test_cells_of_another_device_say_so_and_build_nothing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    card = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)
    folder, cells = trivial.write([trivial.choice(4, gpu=card)], store)
    artifacts = tuple(dict.fromkeys(cell.artifact_id for cell in cells))
    listed = TaskList("one", 2, (Task(artifacts, tuple(cell.cell_id for cell in cells)),))
    assert run(folder, listed)[0] == 0
    found = records.read_all(store, cells)
    assert [record.status for record in found.values()] == ["wrong_device"] * len(cells)
    assert not trivial.ledger(tmp_path / "ledger")
