"""The controller with real processes: what is skipped, what is run, how a sweep ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec, device
from qgrid import sweep as sweep_module
from qgrid.files import write_atomic
from qgrid.running import assembly, controller, machine, pipeline
from qgrid.running.controller import Sweep
from qgrid.running.progress import Progress
from qgrid.running.slots import Slot
from qgrid.store import records
from qgrid.types import Failure, Measurement, PlannedCell, Record, Settings, Status
from tests import faults
from tests.drills import trivial

RUN = "import sys; from qgrid import sweep; sys.exit(sweep.run_cells(sys.argv[1], sys.argv[2:]))"


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults.install(monkeypatch)
    monkeypatch.setattr("qgrid.files.machine_locks", lambda: tmp_path / "machine")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the same for processes started from here


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a checkpoint until somebody loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def light(model: Path, act: str, **changes: Any) -> PlannedCell:
    return faults.planned(faults.cell(model, act, runtime="light", **changes))


def run(cells: Sequence[PlannedCell], settings: Settings) -> tuple[int, list[str]]:
    """Exit code and printed lines of a sweep."""
    text = io.StringIO()
    sweep = Sweep(cells, settings, faults.folder(Path(settings.out)), Progress(cells, text))
    sweep.run()
    return sweep.verdict(), text.getvalue().splitlines()


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """What a failed test leaves running would hold locks and time."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def start(cells: Sequence[PlannedCell], settings: Settings) -> subprocess.Popen[str]:
    """The same in a process of its own, the way a launcher starts it."""
    folder = faults.folder(Path(settings.out))
    write_atomic(folder / "settings.json", codec.dumps(settings))
    write_atomic(folder / "plan.jsonl", "".join(f"{codec.dumps(cell)}\n" for cell in cells))
    command = [sys.executable, "-c", RUN, str(folder / "plan.jsonl"), *(c.cell_id for c in cells)]
    STARTED.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    return STARTED[-1]


def statuses(store: Path, cells: Sequence[PlannedCell]) -> list[str]:
    return [record.status for record in records.read_all(store, cells).values()]


def write_record(store: Path, planned: PlannedCell, status: Status, fingerprint: str) -> Record:
    record = assembly.refused(planned, status, "because", {"fingerprint": fingerprint})
    if status == "ok":
        record = replace(record, error=None)
    records.write(store, record)
    return record


# --- failures: each ends its own cell and nothing else -------------------------------------------


def test_each_failure_is_its_cell_s_status_and_the_grid_goes_on(
    tmp_path: Path, model: Path
) -> None:
    store = tmp_path / "store"
    refused = replace(light(model, "work", outputs=9), status="unsupported", reason="no such width")
    elsewhere = light(model, "work")
    gpu = replace(elsewhere.cell.gpu, name="h100", kind="cuda", match="H100")
    elsewhere = replace(elsewhere, cell=replace(elsewhere.cell, gpu=gpu), predicted={"gib": 4.0})
    acts = ("abort", "hang", "allocate", "raise")
    cells = [*(light(model, act) for act in acts), refused, elsewhere]

    code, lines = run(cells, faults.settings(store, limit=3.0))

    assert code == 1
    assert statuses(store, cells) == [
        "crashed", "timeout", "oom", "crashed", "unsupported", "wrong_device",
    ]  # fmt: skip
    record = records.read(store, elsewhere.cell_id)
    assert record is not None
    assert record.predicted == {"gib": 4.0}
    assert record.measurements == ()
    assert "this machine has" in str(record.error)
    assert "no cell is ok" in lines
    assert sum(line.startswith("crashed: ") for line in lines) == 2
    assert any(line.startswith("timeout: ") and "limits.artifact" in line for line in lines)
    assert not list((store / "artifacts").glob(".*"))
    assert "hunter2" not in "".join(p.read_text() for p in store.rglob("*") if p.is_file())


def test_an_artifact_that_failed_is_not_tried_again_by_the_next_cell(
    tmp_path: Path, model: Path
) -> None:
    cells = [light(model, "raise", outputs=outputs) for outputs in (2, 3)]
    run(cells, faults.settings(tmp_path / "store"))
    assert statuses(tmp_path / "store", cells) == ["crashed", "crashed"]
    assert len(list((tmp_path / "store" / "builds").glob("*/job.json"))) == 1


def test_the_controller_s_own_fault_is_the_cell_s(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise OSError("the disk is gone")

    monkeypatch.setattr("qgrid.store.records.load_result", broken)
    cell = light(model, "work")
    assert run([cell], faults.settings(tmp_path / "store"))[0] == 1
    record = records.read(tmp_path / "store", cell.cell_id)
    assert record is not None
    assert record.status == "crashed"
    assert "the disk is gone" in str(record.error)


# --- interruption --------------------------------------------------------------------------------


def hanging_pids(store: Path, cell: PlannedCell) -> list[int]:
    log = store / "builds" / cell.artifact_id / "log.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("pid ")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_leaves_nothing_and_goes_on_next_time(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    store = tmp_path / "store"
    cells = [light(model, "allocate"), light(model, "hang")]
    process = start(cells, faults.settings(store))
    faults.wait_for(lambda: records.read(store, cells[0].cell_id), "the first record")
    faults.wait_for(lambda: hanging_pids(store, cells[1]), "the hanging stage")
    process.send_signal(number)
    output, _ = process.communicate(timeout=faults.SECONDS)

    assert process.returncode == controller.INTERRUPTED
    assert "the same command goes on" in output.splitlines()[-1]
    assert not any(map(faults.is_alive, hanging_pids(store, cells[1])))
    assert not list((store / "artifacts").glob(".*"))
    assert not [file for file in store.rglob("*") if file.name.startswith(".")]
    assert records.read(store, cells[1].cell_id) is None

    code, lines = run(cells, faults.settings(store, limit=3.0))
    assert "2 cells: 1 to run, 1 done before" in lines
    assert statuses(store, cells) == ["oom", "timeout"]
    assert code == 1


def test_a_killed_controller_leaves_no_process_and_no_torn_record(
    tmp_path: Path, model: Path
) -> None:
    store = tmp_path / "store"
    cells = [light(model, "allocate"), light(model, "deaf")]
    process = start(cells, faults.settings(store))
    faults.wait_for(lambda: records.read(store, cells[0].cell_id), "the first record")
    faults.wait_for(lambda: len(hanging_pids(store, cells[1])) == 2, "the hanging stage")
    process.kill()
    process.communicate()
    pids = hanging_pids(store, cells[1])
    faults.wait_for(lambda: not any(map(faults.is_alive, pids)), "the end of its processes")
    assert statuses(store, cells) == ["oom"]


# --- what is done already ------------------------------------------------------------------------


@dataclass
class Case:
    status: Status
    rerun: tuple[str, ...]
    fresh: bool
    same_environment: bool
    expected: str


@pytest.mark.parametrize(
    "case",
    [
        Case("ok", (), False, True, "done"),
        Case("oom", (), False, True, "done"),
        Case("oom", ("oom",), False, True, "run"),
        Case("ok", ("oom",), False, True, "done"),
        Case("crashed", (), False, True, "run"),
        Case("timeout", (), False, True, "run"),
        Case("bad_artifact", (), False, True, "run"),
        Case("ok", (), True, True, "run"),
        Case("ok", (), False, False, "stale"),
        Case("ok", ("stale",), False, False, "rerun_stale"),
        Case("ok", ("stale",), False, True, "done"),
        Case("wrong_device", (), False, True, "run"),
        Case("unsupported", (), False, True, "run"),  # an older plan refused it
    ],
    ids=lambda case: f"{case.status}-{'-'.join(case.rerun)}-{case.expected}",
)
def test_a_record_decides(tmp_path: Path, model: Path, case: Case) -> None:
    store = tmp_path / "store"
    cell = light(model, "work")
    settings = faults.settings(store, rerun=case.rerun, fresh=case.fresh)
    sweep = Sweep([cell], settings, faults.folder(store))
    now = sweep._rule.fingerprint if case.same_environment else "another"
    known = {cell.cell_id: write_record(store, cell, case.status, now)}
    assert sweep._rule.decide(cell, known[cell.cell_id]) == case.expected


@pytest.mark.parametrize("metric", ["timing_cv", "busy_elsewhere", "merged_first_tokens"])
def test_an_unstable_timing_is_repeated_on_request(
    tmp_path: Path, model: Path, metric: str
) -> None:
    store = tmp_path / "store"
    cell = light(model, "work")
    for rerun, value, expected in (
        (("unstable",), 0.5, "run"),
        (("unstable",), 0.01, "done"),
        ((), 0.5, "done"),
    ):
        sweep = Sweep([cell], faults.settings(store, rerun=rerun), faults.folder(store))
        now = sweep._rule.fingerprint
        record = write_record(store, cell, "ok", now)
        measured = replace(record, measurements=(Measurement(metric, value, "1"),))
        assert sweep._rule.decide(cell, measured) == expected


def test_a_cell_without_a_record_runs_and_a_refused_one_is_refused_once(
    tmp_path: Path, model: Path
) -> None:
    cell = light(model, "work")
    refused = replace(cell, status="does_not_fit", reason="because")
    sweep = Sweep([cell], faults.settings(tmp_path), faults.folder(tmp_path))
    assert sweep._rule.decide(cell, None) == "run"
    assert sweep._rule.decide(refused, None) == "refuse"
    said = {cell.cell_id: write_record(tmp_path, refused, "does_not_fit", "any")}
    assert sweep._rule.decide(refused, said[cell.cell_id]) == "done"
    assert sweep._rule.decide(replace(refused, reason="another"), said[cell.cell_id]) == "refuse"
    measured = {cell.cell_id: write_record(tmp_path, cell, "ok", "any")}
    assert sweep._rule.decide(refused, measured[cell.cell_id]) == "done"


def test_what_the_right_device_measured_is_kept_on_another(tmp_path: Path, model: Path) -> None:
    cell = light(model, "work")
    cell = replace(cell, cell=replace(cell.cell, gpu=replace(cell.cell.gpu, match="H100")))
    sweep = Sweep([cell], faults.settings(tmp_path, fresh=True), faults.folder(tmp_path))
    assert sweep._rule.decide(cell, None) == "wrong_device"
    known = {cell.cell_id: write_record(tmp_path, cell, "ok", "another")}
    assert sweep._rule.decide(cell, known[cell.cell_id]) == "done"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (("ok",), 0),
        (("ok", "oom", "unsupported", "wrong_device", "does_not_fit"), 0),
        (("ok", "crashed"), 1),
        (("ok", "timeout"), 1),
        (("ok", "bad_artifact"), 1),
        (("ok", "invalid"), 1),
        (("oom", "unsupported"), 1),
    ],
)
def test_exit_code(tmp_path: Path, model: Path, ends: tuple[Status, ...], expected: int) -> None:
    cells = [light(model, "work", outputs=2 + number) for number in range(len(ends))]
    text = io.StringIO()
    sweep = Sweep(cells, faults.settings(tmp_path), faults.folder(tmp_path), Progress(cells, text))
    sweep.records = {
        cell.cell_id: write_record(tmp_path, cell, status, "any")
        for cell, status in zip(cells, ends, strict=True)
    }
    assert sweep.verdict() == expected
    assert len(text.getvalue().splitlines()) == expected


def test_an_unreadable_record_is_a_wrong_command(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    cell = light(model, "work")
    write_atomic(records.path(store, cell.cell_id), '{"schema": "qgrid.record/99"}')
    code = controller.run([cell], faults.settings(store), faults.folder(store))
    assert code == controller.UNREADABLE
    assert "this qgrid reads" in capsys.readouterr().out


# --- whole cells on a real model -----------------------------------------------------------------


@dataclass
class Grid:
    """A sweep that ran: a baseline, another workload, a failing quality, a failing speed."""

    store: Path
    cells: list[PlannedCell]
    code: int
    lines: list[str]

    def records(self) -> list[Record]:
        return list(records.read_all(self.store, self.cells).values())


@pytest.fixture(scope="module")
def grid(tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    with pytest.MonkeyPatch.context() as patch:
        faults.install(patch)
        store = tmp_path_factory.mktemp("grid")
        base = faults.planned(faults.cell(tiny_random))
        patch.setattr("qgrid.files.machine_locks", lambda: store / "machine")
        other = faults.planned(faults.cell(tiny_random, outputs=3))
        failing = [
            faults.cell(tiny_random, quality="abort"),
            faults.cell(tiny_random, speed="exit"),
        ]
        cells = [base, other, *(faults.planned(cell, base) for cell in failing)]
        code, lines = run(cells, faults.settings(store))
        yield Grid(store, cells, code, lines)


def metrics(record: Record) -> set[str]:
    return {measurement.metric for measurement in record.measurements}


@pytest.mark.slow
def test_a_grid_runs_and_a_failed_stage_keeps_what_the_others_gave(grid: Grid) -> None:
    base, other, no_quality, no_speed = grid.records()
    assert [r.status for r in grid.records()] == ["ok", "ok", "crashed", "crashed"]
    assert grid.code == 1
    assert {"decode_throughput", "bits_per_weight"} <= metrics(base)
    assert "decode_throughput" in metrics(no_quality)
    assert "decode_throughput" not in metrics(no_speed)
    assert "size_on_disk_bytes" in metrics(no_speed)
    assert "SIGABRT" in str(no_quality.error)
    assert set(base.artifact["files"]) >= {"model.safetensors", "config.json"}
    assert base.observed["device"]["name"] == device.describe().name
    assert {"artifact", "quality", "speed"} <= set(base.environment["stages"])
    assert other.timings["wall_seconds"] >= other.timings["work_seconds"]


@pytest.mark.slow
def test_artifact_and_quality_are_shared_by_cells(grid: Grid) -> None:
    base, other, *_ = grid.cells
    assert base.quality_id == other.quality_id
    folder = grid.store / "cells" / other.cell_id
    assert (folder / "speed" / "result.json").exists()
    assert [path.name for path in (grid.store / "builds").iterdir()] == [base.artifact_id]
    asked = [json.loads((p / "job.json").read_text()) for p in (grid.store / "quality").glob("*/")]
    assert [job["planned"]["cell_id"] for job in asked].count(other.cell_id) == 0


@pytest.mark.slow
def test_the_second_run_starts_nothing(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "Worker", None)  # nobody may start one
    code, lines = run(grid.cells[:2], faults.settings(grid.store))
    assert code == 0
    assert lines[0] == "2 cells: 2 done before"
    assert all(line.endswith("(done before)") for line in lines[1:])


@pytest.mark.slow
def test_a_deleted_record_is_timed_again_with_its_stored_quality(
    grid: Grid, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(grid.store, store, symlinks=True)
    base, other = grid.cells[:2]
    records.path(store, other.cell_id).unlink()
    quality = store / "quality" / other.quality_id / "result.json"
    before = quality.stat().st_mtime_ns
    timed = store / "cells" / other.cell_id / "speed" / "result.json"
    earlier = timed.read_text()
    code, lines = run([base, other], faults.settings(store))
    assert code == 0
    assert [line for line in lines if line.endswith("...")] == [
        next(line for line in lines if "out3: speed ..." in line)
    ]
    assert quality.stat().st_mtime_ns == before
    assert timed.read_text() != earlier


@pytest.mark.slow
def test_a_damaged_artifact_is_bad_and_fresh_builds_it_again(grid: Grid, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(grid.store, store, symlinks=True)
    base = grid.cells[0]
    records.path(store, base.cell_id).unlink()
    config = store / "artifacts" / base.artifact_id / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text + " ")
    code, lines = run([base], faults.settings(store))
    assert code == 1
    assert any(line.startswith("bad_artifact: ") and "files" in line for line in lines)
    record = records.read(store, base.cell_id)
    assert record is not None
    assert record.measurements == ()
    code, lines = run([base], faults.settings(store, fresh=True))
    assert code == 0
    assert [line.split(": ")[1] for line in lines if line.endswith("...")] == [
        "artifact ...", "quality ...", "speed ...",
    ]  # fmt: skip


# --- the rest ------------------------------------------------------------------------------------


def test_a_timing_holds_the_machine_alone() -> None:
    order: list[str] = []
    timing, release = threading.Event(), threading.Event()

    def time_alone() -> None:
        with machine.hold(alone=True):
            timing.set()
            release.wait(faults.SECONDS)
            order.append("timed")

    def score() -> None:
        with machine.hold(alone=False):
            order.append("scored")

    with machine.hold(alone=False):
        other = threading.Thread(target=score)
        other.start()
        other.join(faults.SECONDS)  # scoring goes beside scoring
        assert order == ["scored"]
        first = threading.Thread(target=time_alone)
        first.start()
        assert not timing.wait(0.1)
    assert timing.wait(faults.SECONDS)
    second = threading.Thread(target=score)
    second.start()
    second.join(0.1)
    assert order == ["scored"]
    release.set()
    for thread in (first, second):
        thread.join(faults.SECONDS)
    assert order == ["scored", "timed", "scored"]


def test_a_failing_mirror_costs_one_line(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qgrid.mirroring import tracking

    def start(*_: object) -> object:
        raise ConnectionError("no route; api_key=0123456789abcdef")

    monkeypatch.setattr(tracking, "start", start)
    cells = [light(model, "allocate", outputs=outputs) for outputs in (2, 3)]
    _, lines = run(cells, faults.settings(tmp_path / "store"))
    told = [line for line in lines if "tracking is off" in line]
    assert len(told) == 1
    assert "0123456789abcdef" not in told[0]
    assert statuses(tmp_path / "store", cells) == ["oom", "oom"]


def test_progress_names_what_varies(model: Path) -> None:
    cells = [light(model, "work", outputs=outputs) for outputs in (2, 3)]
    text = io.StringIO()
    progress = Progress(cells, text)
    assert [progress.label(cell) for cell in cells] == [
        "random faulty 16-bit out2",
        "random faulty 16-bit out3",
    ]
    progress.open(2)
    progress.begin(cells[0])
    progress.stage(cells[0], "speed")
    failure = Failure("crashed", "why")
    record = assembly.refused(cells[0], "crashed", "why", {})
    assert record.error == failure
    progress.end(cells[0], record, ran=True)
    lines = text.getvalue().splitlines()
    assert lines[0] == "[1/2] random faulty 16-bit out2: speed ..."
    assert "crashed" in lines[1]
    assert "left" in lines[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    cells = [light(model, "work", outputs=outputs) for outputs in (2, 3)]
    text = Terminal()
    progress = Progress(cells, text)
    progress.open(2)
    progress.begin(cells[0])
    progress.stage(cells[0], "quality")
    progress.line("[3/4] not markup")
    progress.end(cells[0], assembly.refused(cells[0], "oom", "why", {}), ran=True)
    progress.close()
    assert "out2: quality" in text.getvalue()
    assert "1/2" in text.getvalue()
    assert "[3/4] not markup" in text.getvalue()


def test_a_path_that_looks_like_a_secret_reaches_the_stage(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOY_KEY", "department-of-models")
    store = tmp_path / "department-of-models" / ("0123456789" * 4)
    _, lines = run([light(model, "work")], faults.settings(store))
    assert "there is no safetensors or GGUF file" in "".join(lines)  # what the stage itself found


# --- several slots -------------------------------------------------------------------------------


def test_a_cell_out_of_memory_frees_its_slot_and_the_rest_goes_on(
    tmp_path: Path, model: Path
) -> None:
    store = tmp_path / "store"
    acts = ("allocate", "hang", "abort", "raise")
    cells = [light(model, act) for act in acts] + [light(model, "allocate", outputs=3)]
    text = io.StringIO()
    settings = faults.settings(store, limit=5.0)
    part = controller.Part(slots=(Slot((0,)), Slot((0,))))
    sweep = Sweep(cells, settings, faults.folder(store), Progress(cells, text), part)
    sweep.run()
    assert sweep.verdict() == 1
    assert statuses(store, cells) == ["oom", "timeout", "crashed", "crashed", "oom"]
    assert sum("artifact ..." in line for line in text.getvalue().splitlines()) == 4
    assert not list((store / "artifacts").glob(".*"))


def test_going_on_with_a_fresh_sweep_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trivial.install(monkeypatch)
    store, ledger = tmp_path / "store", tmp_path / "ledger"
    monkeypatch.setenv(trivial.LEDGER, str(ledger))
    fresh = [trivial.choice(16), trivial.choice(4)]

    def stages(command: bool) -> int:
        if command:  # a new one plans anew; `resume` takes the plan as it is
            trivial.write(fresh, store, fresh=True)
        before = len(trivial.ledger(ledger))
        assert sweep_module.run_cells(str(store / "sweeps" / "trivial" / "plan.jsonl")) == 0
        return (len(trivial.ledger(ledger)) - before) // 2  # each begins and ends

    all_of_them = stages(command=True)
    assert all_of_them >= 6
    assert stages(command=False) == 0
    records.path(store, trivial.planned(fresh, store)[1].cell_id).unlink()
    assert stages(command=False) == 1  # its timing alone
    assert stages(command=True) == all_of_them


def test_a_quality_that_was_set_aside_is_measured_again_and_the_timing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trivial.install(monkeypatch)
    store = tmp_path / "store"
    folder, cells = trivial.write([trivial.choice(16), trivial.choice(4)], store)
    plan_file = str(folder / "plan.jsonl")
    assert sweep_module.run_cells(plan_file) == 0
    before = {cell.cell_id: records.read(store, cell.cell_id) for cell in cells}
    locked = (folder / "sweep.lock.yaml").read_text()
    shutil.rmtree(store / "quality" / cells[1].quality_id)
    assert sweep_module.run_cells(plan_file) == 0
    assert (folder / "sweep.lock.yaml").read_text() == locked
    again, first = records.read(store, cells[1].cell_id), before[cells[1].cell_id]
    assert again is not None
    assert first is not None
    assert again.environment["launch"] != first.environment["launch"]
    assert again.measurements == first.measurements  # its timing, too
    assert records.read(store, cells[0].cell_id) == before[cells[0].cell_id]


def test_slots_work_beside_each_other_and_timings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trivial.install(monkeypatch)
    monkeypatch.setenv(trivial.LEDGER, str(tmp_path / "ledger"))
    # builds so long that they meet on a busy machine, too
    pauses: dict[str, Any] = {"pause": 1.5, "quality_pause": 0.3, "speed_pause": 0.3}
    choices = [trivial.choice(16, load=n, **pauses) for n in range(2)]
    choices += [trivial.choice(4, number=n, **pauses) for n in (1, 2)]
    folder, cells = trivial.write(choices, tmp_path / "store")
    settings = trivial.settings(tmp_path / "store")
    part = controller.Part(slots=(Slot((0,)), Slot((0,)), Slot((0,))))
    sweep = Sweep(cells, settings, folder, Progress(cells, io.StringIO()), part)
    sweep.run()
    assert set(statuses(tmp_path / "store", cells)) == {"ok"}
    open_stages: dict[int, str] = {}
    beside = set()
    cores = {"artifact": [0], "quality": [0], "speed": sorted(os.sched_getaffinity(0))}
    for line in trivial.ledger(tmp_path / "ledger"):
        assert line["cores"] == cores[line["stage"]]  # a timing runs as where it is the only slot
        if line["event"] == "begin":
            open_stages[line["pid"]] = line["stage"]
        else:
            del open_stages[line["pid"]]
        beside.add(tuple(sorted(open_stages.values())))
    assert ("speed",) in beside
    assert not any("speed" in stages and len(stages) > 1 for stages in beside)
    assert any(len(stages) > 1 for stages in beside)
