"""How far other processes were in the way of a timing, by the kernel's account of processors."""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType
from typing import Self

_TICK = 0.01  # seconds: the kernel counts in these, on each processor


class Bystanders:
    """`with Bystanders(threads) as others: ...` then `others.processors`.

    Of the processors that `threads` threads want, so many were kept busy by others, on average;
    processors that were to spare do not count. None where the system keeps no account.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._begin: tuple[float, float, float] | None = None
        self.processors: float | None = None

    def __enter__(self) -> Self:
        self._begin = _account()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = _account()
        if self._begin is None or end is None:
            return
        wall, busy, own = (after - before for before, after in zip(self._begin, end, strict=True))
        cores = len(_usable())
        self.processors = in_the_way(wall, busy - own, self._threads, cores)


def in_the_way(wall: float, others: float, threads: int, cores: int) -> float:
    """Processors wanted and not had, from seconds of wall time and of others' processor time."""
    used = max(0.0, others - _TICK * cores) / wall
    return min(used, max(0.0, used + threads - cores))


def _account() -> tuple[float, float, float] | None:
    """Wall time, processor time of everybody on the usable processors, and our own."""
    import psutil

    each = psutil.cpu_times(percpu=True)
    usable = [times for number, times in enumerate(each) if number in _usable()]
    if not usable:
        return None
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are counted as user time as well
    busy = sum(sum(t) - sum(getattr(t, name, 0.0) for name in idle) for t in usable)
    return time.perf_counter(), busy, _own()


def _own() -> float:
    """Processor time of this process and of all below it: a server that it started is no stranger.

    That of a process that has ended is its parent's by then.
    """
    import psutil

    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            each = child.cpu_times()
            total += each.user + each.system + each.children_user + each.children_system
    return float(total)


def _usable() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
