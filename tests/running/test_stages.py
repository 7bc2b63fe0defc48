"""How a stage ends."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from qgrid import codec
from qgrid.contracts import InvalidEngine
from qgrid.running import stages
from qgrid.types import Cell, Job, Method, PlannedCell, Stage, StageResult


@pytest.fixture
def job(tiny_random: Path, tmp_path: Path, make_cell: Callable[..., Cell]) -> Callable[..., Job]:
    def make(stage: Stage, cell: Cell | None = None) -> Job:
        planned = PlannedCell("c", "a", "q", None, cell or make_cell(), added=False)
        return Job(stage, planned, str(tiny_random), None, str(tmp_path), str(tmp_path))

    return make


@pytest.mark.parametrize("stage", ["quality", "speed"])
def test_a_stage_gives_its_result(job: Callable[..., Job], stage: Stage) -> None:
    result = stages.run(job(stage))
    assert result.failure is None
    assert result.stage == stage
    assert codec.loads(StageResult, codec.dumps(result)) == result


def test_an_artifact_without_its_quantization_is_invalid(
    job: Callable[..., Job], make_cell: Callable[..., Cell]
) -> None:
    result = stages.run(job("quality", make_cell(method=Method("rtn", {}), bits=4)))
    assert result.failure is not None
    assert result.failure.status == "invalid"
    assert result.failure.message.startswith("method `rtn` with `bits=4` was asked for")
    assert not result.measurements


class BadArtifact(Exception):
    """Stands for any error of that name, a subclass included."""


class Worse(BadArtifact):
    """A subclass."""


class OutOfMemoryError(RuntimeError):
    """What torch calls it."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "oom"),
        (OSError(errno.ENOENT, "No such file or directory"), "crashed"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 99 bytes"), "oom"),
        (InvalidEngine("not what was asked for"), "invalid"),
        (Worse("truncated"), "bad_artifact"),
        (RuntimeError("shapes"), "crashed"),
        (KeyError("vocab_size"), "crashed"),
    ],
)
def test_errors_become_a_status(error: Exception, status: str) -> None:
    failure = stages.classify(error)
    assert failure.status == status
    assert "\n" not in failure.message
    assert failure.traceback


def test_torch_running_out_of_memory_is_oom() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.float32)
    assert stages.classify(caught.value).status == "oom"


def test_a_crash_keeps_its_traceback(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qgrid.measure import speed

    def broken(_: Job) -> StageResult:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(speed, "measure", broken)
    failure = stages.run(job("speed")).failure
    assert failure is not None
    assert failure.message == "ZeroDivisionError: of all things"
    assert failure.traceback is not None and "in broken" in failure.traceback
