"""`kill -9` at random moments of a fast grid, each followed by a resume; nothing may be lost.

    python tests/benchmarks/bench_kill.py [ROUNDS [SEED]]

Kills a controller, a worker, a stage or all of them, wherever they are, and runs the same sweep
again: its records must equal those of an undisturbed run (but for times), and what was finished
before the kill must not be touched.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROUNDS, SEED = 200, 0
SHOWN = 3  # faults of a round


def main(rounds: int, seed: int) -> int:
    sys.path[:0] = [str(ROOT)]
    import pytest

    from tests.drills import kills, running, trivial

    source = random.Random(seed)
    faulty, victims, progress = 0, Counter[str](), Counter[int]()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        trivial.install(patch)
        running.alone(patch, Path(name))
        wanted = kills.undisturbed(Path(name))
        print(f"undisturbed: {len(wanted.cells)} cells in {wanted.seconds:.2f} s; seed {seed}")
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as place:
                killed = kills.one(source, Path(place) / "outputs", wanted)
            victims[killed.victim] += 1
            progress[killed.finished] += 1
            for fault in killed.faults[:SHOWN]:
                print(f"round {number}, {killed.victim} after {killed.steps} steps: {fault}")
            faulty += bool(killed.faults)
    print(f"killed: {dict(sorted(victims.items()))}")
    print(f"finished records at the kill -> rounds: {dict(sorted(progress.items()))}")
    print(f"{rounds - faulty} of {rounds} resumes gave the records of the undisturbed run")
    return 1 if faulty else 0


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*[*given, *(ROUNDS, SEED)[len(given) :]]))
