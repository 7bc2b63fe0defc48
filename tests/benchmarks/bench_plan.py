"""How long a plan of 5,760 cells takes, and whether 200 of them equal `hydra.compose`.

python tests/benchmarks/bench_plan.py
"""

from __future__ import annotations

import itertools
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CONF = Path(__file__).parent / "conf"
AXES = {
    "model": "m1,m2,m3,m4,m5",
    "method": "none,rtn,gptq,awq,nf4,int8,rtn_fine,gptq_fine",
    "bits": "2,4,8",
    "runtime": "r1,r2,r3",
    "gpu": "a100_80,h100,l4,h200",
    "context": "512,1024,2048,4096",
}


def main() -> None:
    overrides = [f"{key}={values}" for key, values in AXES.items()]
    command = [sys.executable, "-m", "qgrid", "plan", "--config-dir", str(CONF), *overrides]
    times = []
    with tempfile.TemporaryDirectory() as out:
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run([*command, f"out={out}"], capture_output=True, text=True)
            times.append(time.perf_counter() - start)
            if done.returncode:
                sys.exit(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(done.stdout.splitlines()[-1])
    print(f"plan: median {sorted(times)[1]:.2f} s of {times}, peak {peak:.2f} GiB")
    compare(overrides)


def compare(overrides: list[str]) -> None:
    """200 sampled cells against `hydra.compose`, and the time Hydra takes for them."""
    import hydra

    from qgrid import config
    from qgrid.hydra_entry import PLUGINS

    sys.path.insert(0, str(PLUGINS))
    combos = list(
        itertools.product(*([f"{k}={v}" for v in vs.split(",")] for k, vs in AXES.items()))
    )
    chosen = random.Random(0).sample(range(len(combos)), 200)
    own = [f"hydra.searchpath=[file://{CONF}]"]
    with hydra.initialize_config_dir(str(config.root("conf")), version_base="1.3"):

        def compose(lines: Sequence[str]) -> config.Composed:
            return config.composed(
                hydra.compose("config", [*own, *lines], return_hydra_config=True)
            )

        grid = list(config.expand(compose, config.parse(overrides, None)))
        start = time.perf_counter()
        composed = [compose(combos[i]).values for i in chosen]
        each = (time.perf_counter() - start) / len(chosen)
    same = sum(grid[i] == one for i, one in zip(chosen, composed, strict=True))
    print(f"{same} of {len(chosen)} sampled cells equal hydra.compose")
    print(f"hydra.compose: {each * 1e3:.0f} ms a cell; its basic sweeper composes each cell twice")


if __name__ == "__main__":
    main()
