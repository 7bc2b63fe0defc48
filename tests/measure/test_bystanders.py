"""Other processes in the way of a timing: counted only where they take what it wants."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qgrid.measure.bystanders import Bystanders, _account, in_the_way


@pytest.mark.parametrize(
    ("others", "threads", "cores", "expected"),
    [
        (0.0, 2, 2, 0.0),
        (10.0, 2, 2, 1.0),  # one busy neighbour on a machine that is wanted whole
        (10.0, 1, 2, 0.0),  # it has the other processor
        (200.0, 8, 64, 0.0),
        (600.0, 8, 64, 3.936),
        (0.1, 2, 2, 0.008),  # a tick on each processor is no evidence
    ],
)
def test_processors_to_spare_do_not_count(
    others: float, threads: int, cores: int, expected: float
) -> None:
    assert in_the_way(10.0, others, threads, cores) == pytest.approx(expected, abs=0.003)


_BURN = "import time; end = time.time() + 30\nwhile time.time() < end: pass"
_STRANGER = (
    "import subprocess, sys; "
    f"print(subprocess.Popen([sys.executable, '-c', {_BURN!r}], stdout=subprocess.DEVNULL).pid)"
)


@contextmanager
def strangers(count: int) -> Iterator[None]:
    """Busy processes that are not below this one: whoever started them has ended."""
    command = [sys.executable, "-c", _STRANGER]
    pids = [int(subprocess.check_output(command, text=True)) for _ in range(count)]
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@contextmanager
def children(count: int) -> Iterator[None]:
    """Busy processes below this one."""
    burning = [subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for each in burning:
            each.kill()
            each.wait()


def test_a_real_neighbour_is_seen_and_own_work_is_not() -> None:
    """Own work is that of this process and of those that it started, such as a server."""
    cores = len(os.sched_getaffinity(0))
    with strangers(cores):
        time.sleep(0.3)
        with Bystanders(cores) as others:
            time.sleep(1.0)
    assert others.processors is not None
    assert others.processors > 0.5 * cores
    with Bystanders(cores) as mine:
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
    assert mine.processors is not None
    assert mine.processors < others.processors
    with children(cores):
        time.sleep(0.3)
        with Bystanders(cores) as servers:
            time.sleep(1.0)
    assert servers.processors is not None
    assert servers.processors < others.processors - 0.3


def test_work_of_a_child_that_ended_meanwhile_is_own() -> None:
    begin = _account()
    with children(1):
        time.sleep(0.5)
    end = _account()
    assert begin is not None
    assert end is not None
    assert end[2] - begin[2] > 0.1
