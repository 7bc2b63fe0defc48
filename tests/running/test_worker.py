"""Stages in real processes: how each end is told apart, and that nothing is left of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qgrid.running import endings, preload, processes
from qgrid.running.processes import Worker
from qgrid.running.worker import FINGERPRINT
from qgrid.store import records
from qgrid.types import Job, StageResult
from tests import faults

MODEL = Path("/nonexistent")


TOLD = {FINGERPRINT: "f00d"}


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.install(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a checkpoint until somebody loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One warm parent for all tests of this file: it must survive whatever its children do."""
    with pytest.MonkeyPatch.context() as patch:
        faults.install(patch)
        made = Worker("main", tmp_path_factory.mktemp("worker") / "worker.log", TOLD)
        yield made
        made.close()


def job_file(tmp_path: Path, model: Path, act: str, runtime: str = "light") -> Path:
    planned = faults.planned(faults.cell(model, act, runtime=runtime))
    out = tmp_path / act
    store = tmp_path / "store"
    artifact = store / "artifacts" / planned.artifact_id
    job = Job("artifact", planned, str(artifact), None, str(out), str(store))
    records.save(out / "job.json", job)
    return out / "job.json"


def run(worker: Worker, job: Path, limit: float = faults.SECONDS) -> StageResult:
    ended = worker.run(job, limit)
    return endings.result("artifact", ended, job.parent, limit)


def pids(job: Path) -> list[int]:
    """Processes of a hanging stage, which it names in its log."""
    log = job.parent / "log.txt"
    text = log.read_text() if log.exists() else ""
    return [int(pid) for pid in re.findall(r"^pid (\d+)$", text, flags=re.MULTILINE)]


def reason(result: StageResult) -> tuple[str, str]:
    assert result.failure is not None
    return result.failure.status, result.failure.message


def test_a_crash_is_crashed_with_its_signal_and_stack(
    worker: Worker, tmp_path: Path, model: Path
) -> None:
    result = run(worker, job_file(tmp_path, model, "abort"))
    status, message = reason(result)
    assert status == "crashed"
    assert "SIGABRT" in message
    assert result.failure is not None
    assert "Fatal Python error: Aborted" in str(result.failure.traceback)


def test_a_silent_exit_is_crashed(worker: Worker, tmp_path: Path, model: Path) -> None:
    status, message = reason(run(worker, job_file(tmp_path, model, "exit")))
    assert status == "crashed"
    assert "exit code 7" in message


def test_a_kill_without_want_of_memory_is_crashed(
    worker: Worker, tmp_path: Path, model: Path
) -> None:
    status, message = reason(run(worker, job_file(tmp_path, model, "kill")))
    assert status == "crashed"
    assert "SIGKILL" in message


def test_an_exception_is_crashed_without_its_secrets(
    worker: Worker, tmp_path: Path, model: Path
) -> None:
    job = job_file(tmp_path, model, "raise")
    status, message = reason(run(worker, job))
    assert status == "crashed"
    assert "cannot reach" in message
    assert "hunter2" not in (job.parent / "result.json").read_text()


def test_allocating_beyond_a_limit_is_oom(worker: Worker, tmp_path: Path, model: Path) -> None:
    assert reason(run(worker, job_file(tmp_path, model, "allocate")))[0] == "oom"


def test_a_kill_by_the_kernel_for_memory_is_oom(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    with faults.memory_cgroup(256 << 20) as group:
        monkeypatch.setenv("QGRID_FAULTS_CGROUP", str(group))
        worker = Worker("main", tmp_path / "worker.log", TOLD)
        status, message = reason(run(worker, job_file(tmp_path, model, "cgroup")))
        worker.close()
    assert status == "oom"
    assert "kernel" in message


def test_a_hang_is_a_timeout_that_shows_where_and_leaves_nothing(
    worker: Worker, tmp_path: Path, model: Path
) -> None:
    job = job_file(tmp_path, model, "hang")
    result = run(worker, job, limit=3.0)
    status, message = reason(result)
    assert status == "timeout"
    assert "limits.artifact" in message
    assert result.failure is not None
    assert "_hang" in str(result.failure.traceback)
    assert len(pids(job)) == 1
    assert not any(map(faults.is_alive, pids(job)))
    assert not list((tmp_path / "store" / "artifacts").glob(".*"))  # asked to end, it cleaned up


def test_a_deaf_hang_is_killed_with_what_it_started(
    worker: Worker, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    job = job_file(tmp_path, model, "deaf")
    assert reason(run(worker, job, limit=4.0))[0] == "timeout"
    assert len(pids(job)) == 2
    faults.wait_for(lambda: not any(map(faults.is_alive, pids(job))), "the end of both")


def test_a_worker_serves_on_after_a_failure(worker: Worker, tmp_path: Path, model: Path) -> None:
    statuses = [reason(run(worker, job_file(tmp_path, model, a)))[0] for a in ("abort", "allocate")]
    assert statuses == ["crashed", "oom"]


def test_a_stage_that_kills_the_parent_is_crashed(
    worker: Worker, tmp_path: Path, model: Path
) -> None:
    job = job_file(tmp_path, model, "kill_parent")
    with pytest.raises(processes.WorkerLost):
        worker.run(job, faults.SECONDS)
    assert reason(run(worker, job_file(tmp_path, model, "exit")))[0] == "crashed"


def test_a_parent_that_hangs_does_not_hang_the_controller(
    worker: Worker, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(worker, job_file(tmp_path, model, "exit"))
    assert worker._process is not None
    stopped = worker._process.pid
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr(processes, "START_SECONDS", 1.0)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    with pytest.raises(processes.WorkerLost):
        worker._run(job_file(tmp_path, model, "exit"), faults.SECONDS)
    monkeypatch.setattr(processes, "START_SECONDS", faults.SECONDS)
    worker.close()
    assert not faults.is_alive(stopped)
    assert reason(run(worker, job_file(tmp_path, model, "exit")))[0] == "crashed"


def test_a_killed_controller_leaves_no_process(tmp_path: Path, model: Path) -> None:
    code = (
        "import sys, pathlib; from qgrid.running.processes import Worker\n"
        "Worker('main', pathlib.Path(sys.argv[1]), {}).run(pathlib.Path(sys.argv[2]), 600)"
    )
    job = job_file(tmp_path, model, "deaf")
    controller = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log"), str(job)])
    faults.wait_for(lambda: len(pids(job)) == 2, "a stage")
    controller.kill()
    controller.wait()
    faults.wait_for(lambda: not any(map(faults.is_alive, pids(job))), "the stage's end")


def test_one_job_runs_without_a_parent(tmp_path: Path, model: Path) -> None:
    job = job_file(tmp_path, model, "raise")
    subprocess.run([sys.executable, "-m", "qgrid.running.worker", "--job", str(job)], check=True)
    result = records.load_result(job.parent / "result.json")
    assert result is not None
    assert reason(result)[0] == "crashed"
    assert "qgrid" in result.environment["imported"]


def test_a_child_of_a_parent_that_touched_the_gpu_starts_afresh(
    tmp_path: Path, model: Path
) -> None:
    code = (
        "import sys, types; from qgrid.running import worker\n"
        "cuda = types.SimpleNamespace(_is_in_bad_fork=lambda: True)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
        "worker.main([])"
    )
    worker = Worker("main", tmp_path / "worker.log", TOLD)
    worker._command = [sys.executable, "-c", code]
    result = run(worker, job_file(tmp_path, model, "raise"))
    worker.close()
    assert reason(result)[0] == "crashed"
    assert "qgrid" in result.environment["imported"]  # by a process that had nothing imported


def test_a_result_says_where_it_was_made(worker: Worker, tmp_path: Path, model: Path) -> None:
    result = run(worker, job_file(tmp_path, model, "raise"))
    assert result.environment["fingerprint"] == "f00d"
    assert result.environment["baseline"] is None


def test_a_forked_child_imports_nothing_again(worker: Worker, tmp_path: Path, model: Path) -> None:
    run(worker, job_file(tmp_path, model, "exit"))
    result = run(worker, job_file(tmp_path, model, "raise"))
    assert not {"torch", "transformers"} & set(result.environment["imported"])


def test_what_a_job_needs_is_known_without_importing_it(tmp_path: Path, model: Path) -> None:
    stage, distributions = preload.needs(job_file(tmp_path, model, "work", "faulty"))
    assert stage == "artifact"
    assert distributions[:2] == ("torch", "transformers")
    assert preload.needs(tmp_path / "absent.json") == ("artifact", ())


def test_an_unknown_environment_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(processes.UnknownInterpreter, match="no environment `vlm` to build"):
        Worker("vlm", tmp_path / "log", {})


def test_a_stage_of_the_main_environment_is_told_by_the_record(
    worker: Worker, tmp_path: Path, model: Path
) -> None:
    """Its versions are the record's own: the result repeats nothing."""
    result = run(worker, job_file(tmp_path, model, "raise"))
    assert not {"environment", "versions", "python"} & result.environment.keys()
