"""Other processes in the way of a timing: counted only where they take what it wants."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from qgrid.measure.bystanders import Bystanders, in_the_way


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


def test_a_real_neighbour_is_seen_and_own_work_is_not() -> None:
    cores = len(os.sched_getaffinity(0))
    neighbours = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)
    ]
    try:
        time.sleep(0.3)
        with Bystanders(cores) as others:
            time.sleep(1.0)
    finally:
        for each in neighbours:
            each.kill()
            each.wait()
    assert others.processors is not None
    assert others.processors > 0.5 * cores
    before = others.processors
    with Bystanders(cores) as mine:
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
    assert mine.processors is not None
    assert mine.processors < before
