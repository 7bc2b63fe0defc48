"""What timings in a grid of several slots differ from timings alone: nothing, or the lock leaks.

    python tests/benchmarks/bench_slots.py [ROUNDS]

The same cells, one thread each, run in turn with one slot and with two, each round in stores of
its own. Two slots score and load beside each other, and every timing must have the machine to
itself. Ratios of one cell's throughput in the full grid to the same cell's alone, by round.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
CELLS = 4
BUDGET = 0.03
METRICS = ("decode_throughput", "prefill_throughput")


def main(rounds: int) -> int:
    sys.path[:0] = [str(ROOT)]
    from qgrid import controller, records, slots
    from qgrid.types import Method, Prose, Runtime, Slices, Workload
    from tests import conftest, faults

    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        model.mkdir()
        conftest.write_model(model, num_hidden_layers=6)
        conftest.write_tokenizer(model)
        prose = Prose("package:qgrid.demo/slices/prose.txt", 8192)
        first = replace(
            faults.cell(model),
            method=Method("none", {}),
            runtime=Runtime(
                "transformers",
                "float32",
                "bfloat16",
                1,
                {"attn_implementation": "sdpa", "kernel": "auto"},
            ),
            slices=Slices("prose", prose, {}),
        )
        cells = [
            faults.planned(
                replace(
                    first,
                    context=first.context + number,  # another quality each
                    workload=Workload(f"w{number}", 64, 64 + number, (1,), 1, 9),
                )
            )
            for number in range(CELLS)
        ]

        def grid(label: str, count: int) -> dict[tuple[str, str], float]:
            store, begin = Path(name) / label, time.perf_counter()
            part = controller.Part(slots=slots.find(cells, count))
            controller.run(cells, faults.settings(store), faults.folder(store), part)
            print(f"{label}: {time.perf_counter() - begin:.0f} s", flush=True)
            return {
                (cell_id, each.metric): each.value
                for cell_id, record in records.read_all(store, cells).items()
                for each in record.measurements
                if each.metric in METRICS and each.slice == "concurrency=1"
            }

        pairs = [(grid(f"alone{n}", 1), grid(f"full{n}", 2)) for n in range(rounds)]
    worst = 0.0
    for metric in METRICS:
        ratios = [
            full[key] / alone[key] for alone, full in pairs for key in alone if key[1] == metric
        ]
        middle = statistics.median(ratios)
        spread = statistics.stdev(map(math.log, ratios)) / math.sqrt(len(ratios))
        worst = max(worst, abs(middle - 1))
        print(f"{metric}: full grid / alone, median {middle:.3f} (n {len(ratios)}, +-{spread:.3f})")
    print(f"load average {os.getloadavg()[0]:.1f}; budget {BUDGET:.0%}")
    return 0 if worst <= BUDGET else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
