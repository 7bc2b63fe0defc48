"""What the end of a stage's process means: a result, or the reason why there is none."""

from __future__ import annotations

import signal
from collections import deque
from pathlib import Path

from qgrid import redact
from qgrid.running.processes import Ended
from qgrid.store import records
from qgrid.types import Failure, Stage, StageResult, Status

TAIL_LINES = 30
OUT_OF_MEMORY = ("MemoryError", "std::bad_alloc", "Cannot allocate memory")


def result(stage: Stage, ended: Ended, out: Path, limit: float) -> StageResult:
    """The stage's own result, else a failure that says how its process ended."""
    own = records.load_result(out / "result.json")
    if own is not None:
        return own
    tail = log_tail(out / "log.txt")
    status, reason = _reason(ended, tail, limit, stage)
    message = f"the {stage} stage {reason} (log: {out / 'log.txt'})"
    return StageResult(stage, failure=Failure(status, redact.text(message), tail or None))


def lost(stage: Stage, reason: str) -> StageResult:
    """The result of a stage that no process could run."""
    return StageResult(
        stage, failure=Failure("crashed", f"the {stage} stage did not run: {reason}")
    )


def log_tail(log: Path) -> str:
    """The last lines of a log, without secrets; empty where there is none."""
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return redact.text("".join(deque(lines, maxlen=TAIL_LINES)).rstrip())
    except FileNotFoundError:
        return ""


def _reason(ended: Ended, tail: str, limit: float, stage: Stage) -> tuple[Status, str]:
    if ended.timed_out:
        return "timeout", f"took longer than {limit:g} s and was stopped; raise `limits.{stage}`"
    if ended.oom_killed:
        return "oom", "was killed by the kernel because the machine ran out of memory"
    if any(words in tail for words in OUT_OF_MEMORY):
        return "oom", "could not allocate memory"
    last = tail.rsplit("\n", maxsplit=1)[-1]
    return "crashed", f"{_how(ended.code)} without a result{f': {last}' if last else ''}"


def _how(code: int | None) -> str:
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
