"""What a cell costs above its workers' own time, through a real Slurm on this machine.

    python tests/benchmarks/bench_slurm.py [CELLS]

Trivial cells for two kinds of cards, one task of each kind at a time, so that there are as many
slots as cores are busy. Overhead of a cell: the wall time from the launcher's start to its end,
times the slots, less what the stages report as their own work, over the cells.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET_SECONDS = 0.2
SLOTS = 2  # one task of each kind of card at a time
ARTIFACTS = (16, 8, 4, 3, 2)


def main(count: int) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "plugins")]
    from qgrid.store import records
    from tests.drills import trivial
    from tests.slurm import cluster, grids

    if reason := cluster.missing():
        print(reason)
        return 0
    share = count // (SLOTS * len(ARTIFACTS))
    choices = [
        trivial.choice(bits, load=load, gpu=grids.here(kind))
        for kind in ("alpha", "beta")
        for bits in ARTIFACTS
        for load in range(share)
    ]
    with tempfile.TemporaryDirectory() as name, cluster.running() as slurm:
        store = Path(name) / "outputs"
        folder, cells = trivial.write(choices, store)
        begin = time.monotonic()
        with grids.launching(
            folder, slurm, throttle=1, cells_per_task=50, poll_seconds=2.0
        ) as running:
            code = running.process.wait()
        wall = time.monotonic() - begin
        print(running.log.read_text()[-2000:])
        found = list(records.read_all(store, cells).values())
        tasks = len(slurm.jobs())
    work = sum(record.timings["work_seconds"] for record in found)
    ok = sum(record.status == "ok" for record in found)
    overhead = (wall * SLOTS - work) / len(cells)
    print(
        f"exit code {code}; {ok} of {len(cells)} cells ok in {tasks} tasks; wall {wall:.1f} s, "
        f"workers' own time {work:.1f} s in {SLOTS} slots; load average {os.getloadavg()[0]:.1f}\n"
        f"overhead {overhead:.3f} s a cell, budget {BUDGET_SECONDS} s"
    )
    return 0 if code == 0 and ok == len(cells) and overhead <= BUDGET_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
