"""How long `qgrid status` takes on a large sweep, from the shell's view.

    python tests/benchmarks/bench_status.py [CELLS]

Four fifths of the cells have a record (copies of a real one); of the rest, where there is a Slurm,
tasks wait in the queue of a real cluster.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET_SECONDS = 1.0
REPEATS = 5


def main(count: int) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "plugins")]
    from tests.drills import trivial
    from tests.slurm import cluster, grids

    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "outputs"
        gpu = grids.here("alpha")
        folder, cells = trivial.write(
            (trivial.choice(4, load=load, gpu=gpu) for load in range(count // 2)), store
        )
        _measure_one(folder.parents[1] / "one", store, [each.cell_id for each in cells])
        slowest = _time("no launcher", folder, trivial.variables())
        if reason := cluster.missing():
            print(reason)
        else:
            with cluster.running() as slurm:
                waiting = ["hold"]
                with grids.launching(folder, slurm, detach=True, extra=waiting) as launcher:
                    if launcher.process.wait():
                        print(launcher.log.read_text())
                        return 1
                    print(f"{len(slurm.queue())} tasks wait in the queue")
                    own = grids.variables(slurm, store)
                    slowest = max(slowest, _time("in Slurm", folder, own))
    print(f"{len(cells)} cells: slowest median {slowest:.2f} s, budget {BUDGET_SECONDS} s")
    return 0 if slowest <= BUDGET_SECONDS else 1


def _measure_one(aside: Path, store: Path, cell_ids: Sequence[str]) -> None:
    """Run one cell in a store aside; copy its record to four fifths of the cells of `store`."""
    from qgrid.store import records
    from tests.drills import running, trivial

    folder, cells = trivial.write([trivial.choice(16)], aside)
    running.finish(folder)
    own = cells[0].cell_id
    text = records.path(aside, own).read_text()
    for cell_id in cell_ids[: len(cell_ids) * 4 // 5]:
        file = records.path(store, cell_id)
        file.parent.mkdir(parents=True)
        file.write_text(text.replace(own, cell_id))


def _time(what: str, folder: Path, variables: dict[str, str]) -> float:
    """The median wall time of the command, printed with its output."""
    command = [sys.executable, "-m", "qgrid", "status", folder.name, f"out={folder.parents[1]}"]
    taken = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(REPEATS):
        begin = time.monotonic()
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        taken.append(time.monotonic() - begin)
    print(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    taken.sort()
    shown = ", ".join(f"{each:.2f}" for each in taken)
    print(
        f"{what}: exit code {done.returncode}; {shown} s, of the processor {cpu / REPEATS:.2f} s; "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    return taken[REPEATS // 2]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000))
