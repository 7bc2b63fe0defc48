"""llama.cpp with and without repacked weights: prefill, decode, decode of eight requests at once.

python tests/benchmarks/bench_kernel.py [--threads 1] [--types Q4_0 Q4_K_M]

Random Llamas of 4 and 150 million parameters, each type as llama.cpp quantizes it. Both engines
hold the same file and take turns in one process; every round loads both afresh, in the other
order, because where a buffer lies in memory makes a part of a small model's speed. Ratios are of
pairs measured one after the other, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qgrid import stats
from qgrid.gguf.types import FILE_TYPES
from qgrid.runtimes import llama_cpp as runtime
from qgrid.types import Cell
from tests.benchmarks.bench_llama_cpp import PROMPT, SHAPES, as_in_a_worker, cell, through_qgrid
from tests.runtimes import random_gguf

KERNELS = ("plain", "repack")
WARMUP, MANY = 1, 8
FIGURES = {"prefill": PROMPT, "decode": 1, f"decode of {MANY}": MANY}  # and tokens of each
Times = tuple[float, ...]  # seconds of each figure


def with_kernel(threads: int, kernel: str, bits: int) -> Cell:
    """A cell of one kernel."""
    made = cell(threads, bits)
    own = dataclasses.replace(made.runtime, options={**made.runtime.options, "kernel": kernel})
    return dataclasses.replace(made, runtime=own)


def timed(engine: runtime.LlamaCpp, prompt: list[int], tokens: int) -> Times:
    """Seconds of a prompt, of a token after it, and of a token of many requests at once."""
    made = engine.generate([prompt[:16]] * MANY, tokens)
    begin = max(each.seconds[0] for each in made)
    step = (max(each.seconds[-1] for each in made) - begin) / (tokens - 1)
    return *through_qgrid(engine, prompt, tokens), step


def one_round(
    folder: Path, bits: int, threads: int, tokens: int, pairs: int, swapped: bool
) -> list[dict[str, Times]]:
    """Times of both kernels, a pair a prompt."""
    order = KERNELS[::-1] if swapped else KERNELS
    engines = {k: runtime.load(folder, with_kernel(threads, k, bits), "float32") for k in order}
    rng = random.Random(swapped)
    found = []
    for pair in range(-WARMUP, pairs):
        prompt = [rng.randrange(1000) for _ in range(PROMPT)]
        turn = order if pair % 2 else order[::-1]
        times = {kernel: timed(engines[kernel], prompt, tokens) for kernel in turn}
        if pair >= 0:
            found.append(times)
    for engine in engines.values():
        engine.close()
    return found


def report(name: str, measured: list[dict[str, Times]]) -> None:
    """Print both speeds and their ratio with its interval."""
    for index, (what, count) in enumerate(FIGURES.items()):
        speeds = {k: count / statistics.median(m[k][index] for m in measured) for k in KERNELS}
        ratios = [each["plain"][index] / each["repack"][index] for each in measured]
        low, high = stats.bootstrap_median(ratios)
        pair = "  ".join(f"{kernel} {speeds[kernel]:8.1f}" for kernel in KERNELS)
        ratio = f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
        print(f"  {name:7} {what:11} {pair} tok/s  repack / plain {ratio}", flush=True)


def main() -> None:
    """Print the ratios of every shape and type."""
    as_in_a_worker()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--types", nargs="+", choices=FILE_TYPES, default=["Q2_K", "Q4_0", "Q4_K_M", "IQ4_NL"]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    for shape in given.shapes:
        print(f"{shape}, {given.threads} threads")
        with tempfile.TemporaryDirectory() as place:
            source = Path(place) / "source.gguf"
            random_gguf.write(source, SHAPES[shape])
            for name in given.types:
                kind = FILE_TYPES[name]
                random_gguf.quantize(source, Path(place) / runtime.WEIGHTS, kind.number)
                measured = [
                    times
                    for turn in range(given.rounds)
                    for times in one_round(
                        Path(place),
                        kind.bits,
                        given.threads,
                        given.tokens,
                        given.pairs,
                        turn % 2 > 0,
                    )
                ]
                report(name, measured)


if __name__ == "__main__":
    main()
