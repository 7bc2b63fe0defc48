"""One stage of one cell: dispatch, and every way in which it can end without a result."""

from __future__ import annotations

import errno
import traceback
from typing import TYPE_CHECKING

from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.types import Failure, StageResult, Status

if TYPE_CHECKING:
    from qgrid.types import Job

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",  # of the driver, beside torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def run(job: Job) -> StageResult:
    """Do the job's stage. Never raises for what the stage did wrong: the failure is the result."""
    try:
        return _dispatch(job)
    except Exception as error:  # noqa: BLE001 - the status of a cell, never lost
        checks = tuple(getattr(error, "checks", ()))  # of a bad artifact: every verdict
        return StageResult(job.stage, checks=checks, failure=classify(error))


def _dispatch(job: Job) -> StageResult:
    if job.stage == "artifact":
        from qgrid.weights.artifacts import build

        return build(job)
    if job.stage == "quality":
        from qgrid.measure import quality

        return quality.measure(job)
    from qgrid.measure import speed

    return speed.measure(job)


def classify(error: Exception) -> Failure:
    """The status that an exception means, in one sentence, with its traceback."""
    trace = "".join(traceback.format_exception(error))
    return Failure(_status(error), _sentence(error), trace)


def _status(error: Exception) -> Status:
    if _is_out_of_memory(error):
        return "oom"
    if isinstance(error, Unsupported):
        return "unsupported"
    if isinstance(error, InvalidEngine):
        return "invalid"
    if any(kind.__name__ == "BadArtifact" for kind in type(error).__mro__):
        return "bad_artifact"
    return "crashed"


def _is_out_of_memory(error: Exception) -> bool:
    """Memory errors of Python and of torch, whose CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def _sentence(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    if isinstance(error, (InvalidEngine, Unsupported)):
        return first
    if isinstance(error, MemoryError):
        return f"the stage ran out of memory: {first}" if first else "the stage ran out of memory"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
