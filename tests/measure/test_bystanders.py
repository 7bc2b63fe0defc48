"""Other processes in the way of a timing: counted only where they take what it wants."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
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
def child() -> Iterator[psutil.Process]:
    """A busy process below this one."""
    with subprocess.Popen([sys.executable, "-c", _BURN]) as burning:
        try:
            yield psutil.Process(burning.pid)
        finally:
            burning.kill()


def burned(process: psutil.Process, seconds: float) -> None:
    """Wait until a process has had so much of a processor, however busy the machine is."""
    while sum(process.cpu_times()[:2]) < seconds:
        time.sleep(0.01)


def own_seconds() -> float:
    """What the account takes for our own work."""
    found = _account()
    assert found is not None
    return found[2]


def test_a_real_neighbour_is_seen() -> None:
    cores = len(os.sched_getaffinity(0))
    with strangers(cores):
        time.sleep(0.3)
        with Bystanders(cores) as others:
            time.sleep(1.0)
    assert others.processors is not None
    assert others.processors > 0.5 * cores


def test_own_work_is_that_of_this_process_and_of_all_that_it_started() -> None:
    """A server below this process is no stranger, also when it has ended meanwhile."""
    begin = own_seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert own_seconds() - begin >= 0.29
    with child() as busy:
        burned(busy, 0.3)
        assert own_seconds() - begin >= 0.55
    assert own_seconds() - begin >= 0.55
