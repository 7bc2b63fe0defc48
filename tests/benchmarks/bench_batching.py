"""Continuous batching: decode rate of 8 requests at once against one, F16 and Q4_K_M.

python tests/benchmarks/bench_batching.py [--threads 2]

On a random Llama of 150 million parameters; the two loads take turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qgrid import stats
from qgrid.contracts import Generation
from qgrid.runtimes import llama_cpp as runtime
from qgrid.serving.samples import Sample
from qgrid.serving.summary import figures
from tests.benchmarks.bench_llama_cpp import as_in_a_worker, cell, loaded
from tests.runtimes import random_gguf
from tests.runtimes.batching import divergence

PROMPT, REQUESTS, WARMUP = 128, 8, 1
WANTED = {"F16": "2 or more, at least 1.8", "Q4_K_M": "only printed"}


def rate(made: Sequence[Generation]) -> float:
    """Decode rate of a batch as qgrid computes it."""
    samples = [
        Sample("", 0, i, None, 0.0, each.seconds, PROMPT, len(each.ids), True)
        for i, each in enumerate(made)
    ]
    found = figures(samples).decode_throughput
    assert found is not None
    return found


def measure(engine: runtime.LlamaCpp, tokens: int, pairs: int, vocab: int) -> None:
    """Print rates, their ratio, whether tokens are the same, and how far logits are apart."""
    rng = random.Random(0)
    rates: dict[int, list[float]] = {1: [], REQUESTS: []}
    same = total = 0
    for pair in range(-WARMUP, pairs):
        prompts = [[rng.randrange(vocab) for _ in range(PROMPT)] for _ in range(REQUESTS)]
        alone = engine.generate(prompts[:1], tokens)
        together = engine.generate(prompts, tokens)
        same += alone[0].ids == together[0].ids
        total += 1
        if pair >= 0:
            rates[1].append(rate(alone))
            rates[REQUESTS].append(rate(together))
    for count, found in rates.items():
        print(f"  {count} at once: {statistics.median(found):.1f} tok/s")
    ratios = [b / a for a, b in zip(rates[1], rates[REQUESTS], strict=True)]
    low, high = stats.bootstrap_median(ratios)
    print(f"  ratio: {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]")
    print(f"  same tokens: {same} of {total} requests")
    apart = divergence(engine, [prompt + [1] * 16 for prompt in prompts])
    print(f"  KL between 1 and {REQUESTS} at once, same tokens fed: mean {apart:.1e}")


def main() -> None:
    """Print both files' rates."""
    as_in_a_worker()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    shape = random_gguf.LARGE
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "F16.gguf", Path(folder) / "Q4_K_M.gguf"
        random_gguf.write(plain, shape, scale=0.03, table=0.3, head=True)
        random_gguf.quantize(plain, packed, random_gguf.Q4_K_M, given.threads)
        for file in (plain, packed):
            print(f"{file.stem}, {given.threads} threads (wanted: {WANTED[file.stem]})")
            engine = runtime.LlamaCpp(*loaded(file), cell(given.threads))
            measure(engine, given.tokens, given.pairs, shape.vocab)
            engine.close()


if __name__ == "__main__":
    main()
