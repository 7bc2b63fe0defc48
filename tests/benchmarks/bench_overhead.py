"""What the controller costs a cell above the stages' own work, imports of libraries included.

    python tests/benchmarks/bench_overhead.py [CELLS]

Runs a baseline and the same model at other workloads and contexts through the real controller and
a warm worker, on a random two-layer model. Overhead of a cell: its wall time less what its stages
report as their own work and less the time it waited for another sweep's timing.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET_SECONDS = 0.3


def main(count: int) -> int:
    sys.path[:0] = [str(ROOT)]
    from qgrid import device
    from qgrid.running import controller
    from qgrid.store import records
    from qgrid.types import Method, Model, Runtime, Workload
    from tests import conftest, faults

    with tempfile.TemporaryDirectory() as name:
        model, store = Path(name) / "model", Path(name) / "outputs"
        model.mkdir()
        conftest.write_model(model)
        conftest.write_tokenizer(model)
        plain = faults.cell(model)
        first = replace(
            plain,
            model=Model("random", str(model), None, False, False),
            method=Method("none", {}),
            runtime=Runtime(
                "transformers", "float32", "bfloat16", 1, {"attn_implementation": "sdpa"}
            ),
            gpu=device.describe(),
        )
        cells = [
            faults.planned(
                replace(
                    first,
                    context=first.context + number,  # another quality id each
                    workload=Workload(f"w{number}", 4, 2 + number, (1,), 2, 5),
                )
            )
            for number in range(count)
        ]
        controller.run(cells, faults.settings(store), faults.folder(store))
        timings = [record.timings for record in records.read_all(store, cells).values()]
    rows = [t["wall_seconds"] - t["work_seconds"] - t.get("waited_seconds", 0.0) for t in timings]
    print(f"{'cell':>4} {'wall s':>8} {'work s':>8} {'overhead s':>10}")
    for number, (timing, overhead) in enumerate(zip(timings, rows, strict=True)):
        wall, work = timing["wall_seconds"], timing["work_seconds"]
        print(f"{number:>4} {wall:>8.2f} {work:>8.2f} {overhead:>10.3f}")
    mean = statistics.mean(rows[1:])
    load = os.getloadavg()[0]
    print(
        f"load average {load:.1f}; first cell {rows[0]:.2f} s (imports); "
        f"mean of the others {mean:.3f} s, budget {BUDGET_SECONDS} s"
    )
    return 0 if mean <= BUDGET_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
