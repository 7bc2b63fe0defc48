"""What timings in a grid of several slots differ from timings alone: nothing, or the lock leaks.

    python tests/benchmarks/bench_slots.py [ROUNDS]

The same cells, one thread each, run with one slot and with two, in stores of their own and in an
order that turns round by round, so that a machine that drifts favours neither. Two slots score and
load beside each other, and every timing must have the machine to itself. Ratios of one cell's
throughput in the full grid to the same cell's alone: geometric mean, standard error over rounds.
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
    from qgrid.running import controller, slots
    from qgrid.store import records
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

        pairs = []
        for number in range(rounds):
            slots_by_name = {"alone": 1, "full": 2}
            order = sorted(slots_by_name, reverse=number % 2 == 1)
            found = {name: grid(f"{name}{number}", slots_by_name[name]) for name in order}
            pairs.append((found["alone"], found["full"]))
    worst = 0.0
    for metric in METRICS:
        logs = [
            statistics.fmean(math.log(full[key] / alone[key]) for key in alone if key[1] == metric)
            for alone, full in pairs
        ]
        middle = math.exp(statistics.fmean(logs))
        # cells of a round share the machine's mood, so rounds are what is counted
        spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
        worst = max(worst, abs(middle - 1))
        print(f"{metric}: full grid / alone {middle:.3f} (+-{spread:.3f}, {len(logs)} rounds)")
    print(f"load average {os.getloadavg()[0]:.1f}; budget {BUDGET:.0%}")
    return 0 if worst <= BUDGET else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
