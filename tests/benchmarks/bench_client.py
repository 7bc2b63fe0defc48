"""What the load generator itself adds: many streams from a server with a fixed clock.

python tests/benchmarks/bench_client.py [--streams 64] [--step-ms 50] [--tokens 100] [--repeats 5]

The server is another process, whose token `i` goes out at `begin + i * step` whatever became of the
one before. Wanted: measured ITL within 2 % of the clock, and under one processor of the client.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qgrid import stats
from qgrid.serving.http_driver import HttpDriver
from qgrid.serving.schedule import Load, Run
from qgrid.types import Workload
from tests.serving.stub import Clock, Stub

ROOT = Path(__file__).resolve().parents[2]


def measure(port: int, given: argparse.Namespace) -> None:
    """Print the ratio of measured gaps to the clock, the delay of arrivals and the work."""
    workload = Workload("bench", 128, given.tokens, (given.streams,), 2, given.repeats)
    server: Any = Stub(Clock(), port=port)  # not entered: it only knows where the other listens
    load = Load(users=given.streams)
    ratios, medians, busy = [], [], []
    with HttpDriver(server, workload) as driver:
        for repeat in range(-1, given.repeats):
            prompts = tuple((repeat + 9,) * 128 for _ in range(given.streams))
            samples = driver.run(Run(load, repeat, prompts, None))
            failed = [each.error for each in samples if each.error is not None]
            assert not failed, failed[0]
            if repeat < 0:
                continue
            gaps = [1000 * gap / given.step_ms for each in samples for gap in each.gaps]
            ratios += gaps
            medians.append(statistics.median(gaps))
        (processors,) = driver.measurements()
        busy.append(processors.value)
    p = {q: stats.percentile(ratios, q) for q in (0.01, 0.5, 0.9, 0.99)}
    print(f"{given.streams} streams, {given.tokens} tokens each, clock of {given.step_ms:g} ms:")
    print(
        f"  ITL / clock: median {p[0.5]:.4f} (repeats {min(medians):.4f} to {max(medians):.4f}; "
        "wanted 0.98 to 1.02)"
    )
    print(f"  ITL / clock: p1 {p[0.01]:.4f}, p90 {p[0.9]:.4f}, p99 {p[0.99]:.4f}")
    print(f"  client: {max(busy):.2f} processors in the busiest repeat (wanted: under 1)")


def main() -> None:
    """Start the server and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    command = [sys.executable, "-m", "tests.serving.stub", json.dumps(given.step_ms / 1000)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            measure(int(server.stdout.readline()), given)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
