"""Prefill and decode through qgrid against a raw `llama_decode` loop, in turn in one process.

python tests/benchmarks/bench_llama_cpp.py [--threads 2]

Random Llamas of 4 and 150 million parameters in F16. Where `llama-bench` is on the PATH it times
the same files, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qgrid import stats
from qgrid.gguf import log
from qgrid.running import worker
from qgrid.runtimes import llama_cpp as runtime
from qgrid.types import Cell, Gpu, KvCache, Method, Model, Runtime, Slices, Workload
from tests.runtimes import random_gguf

PROMPT, WARMUP, ROUNDS = 128, 2, 6
SHAPES = {
    "tiny": random_gguf.Shape(hidden=256, intermediate=768, layers=5, heads=4, vocab=1536),
    "150M": random_gguf.LARGE,
}
Times = tuple[float, float]  # seconds of the prompt, and of each token after the first


def as_in_a_worker() -> None:
    """Variables that a stage computes under; before the first library with threads is loaded."""
    for name, value in worker.SETTINGS.items():
        os.environ.setdefault(name, value)


def cell(threads: int, bits: int = 16) -> Cell:
    """A cell on this CPU with the options that `conf/runtime/llama_cpp.yaml` has."""
    options: dict[str, Any] = {
        "gpu_layers": None,
        "flash_attention": True,
        "batch": 2048,
        "ubatch": 512,
        "mmap": False,
        "kernel": "auto",
    }
    return Cell(
        model=Model("random", "random", None, False, False),
        method=Method("gguf", {}),
        bits=bits,
        runtime=Runtime("llama_cpp", "float32", "float32", threads, options),
        gpu=Gpu("cpu", "cpu", "", None, 64.0, None, 1),
        kv_cache=KvCache("auto16", 16),
        calibration=None,
        slices=Slices("none", None, {}),
        workload=Workload("none", PROMPT, 2, (1,), 2, 5),
        context=512,
        seed=0,
    )


class Raw:
    """The loop that a reader of llama.cpp's examples would write."""

    def __init__(self, model: Any, threads: int, tokens: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        with log.captured():
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = PROMPT + tokens
            params.n_threads = params.n_threads_batch = threads
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            self.context = llama_cpp.llama_init_from_model(model, params)
        vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def close(self) -> None:
        with log.captured():
            self.lib.llama_free(self.context)

    def _token(self) -> int:
        import numpy as np

        self.lib.llama_synchronize(self.context)
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def _decode(self, ids: Sequence[int]) -> int:
        array = (self.lib.llama_token * len(ids))(*ids)
        assert (
            self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids))) == 0
        )
        return self._token()

    def __call__(self, prompt: Sequence[int], tokens: int) -> Times:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        begin = time.perf_counter()
        token = self._decode(prompt)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = self._decode([token])
        return first - begin, (time.perf_counter() - first) / (tokens - 1)


def through_qgrid(engine: runtime.LlamaCpp, prompt: Sequence[int], tokens: int) -> Times:
    """The same as qgrid times it."""
    seconds = engine.generate([prompt], tokens)[0].seconds
    return seconds[0], (seconds[-1] - seconds[0]) / (tokens - 1)


def compare(file: Path, threads: int, tokens: int, pairs: int) -> dict[str, list[Times]]:
    """Times of both, taking turns; both afresh in every round.

    Where a buffer happens to lie in memory makes up to a tenth of a small model's speed.
    """
    times: dict[str, list[Times]] = {"raw": [], "qgrid": []}
    for _ in range(ROUNDS):
        one_round(file, threads, tokens, -(-pairs // ROUNDS), times)
    return times


def one_round(
    file: Path, threads: int, tokens: int, pairs: int, times: dict[str, list[Times]]
) -> None:
    """Add the times of one pair of contexts over the same weights."""
    engine = runtime.LlamaCpp(*loaded(file), cell(threads))
    raw = Raw(engine._model.pointer, threads, tokens)
    rng = random.Random(len(times["raw"]))
    for pair in range(-WARMUP, pairs):
        prompt = [rng.randrange(1000) for _ in range(PROMPT)]
        for name in ("raw", "qgrid") if pair % 2 else ("qgrid", "raw"):
            made = raw(prompt, tokens) if name == "raw" else through_qgrid(engine, prompt, tokens)
            if pair >= 0:
                times[name].append(made)
    raw.close()
    engine.close()


def loaded(file: Path) -> tuple[Any, Any]:
    """Weights and header of a file, for an engine without an artifact."""
    from qgrid.gguf import file as gguf_file
    from qgrid.runtimes._llama_model import Model as Weights
    from qgrid.runtimes._llama_model import Placement

    return Weights(file, Placement(0, 0, mmap=False, repack=True)), gguf_file.read(file)


def reference(file: Path, threads: int, tokens: int) -> Times | None:
    """Seconds of `llama-bench`, where there is one: its prompt, and a token after as long a one."""
    program = shutil.which("llama-bench")
    if program is None:
        return None
    common = [
        program,
        "-m",
        str(file),
        "-t",
        str(threads),
        "-fa",
        "on",
        "-lm",
        "none",
        "-o",
        "json",
    ]
    found = []
    for part in (["-p", str(PROMPT), "-n", "0"], ["-p", "0", "-n", str(tokens), "-d", str(PROMPT)]):
        done = subprocess.run(
            [*common, *part, "-r", "10"], capture_output=True, text=True, check=True
        )
        found.append(statistics.median(json.loads(done.stdout)[0]["samples_ts"]))
    return PROMPT / found[0], 1 / found[1]


def report(times: dict[str, list[Times]], others: Sequence[Times]) -> None:
    """Print speeds, and qgrid's against each of the others."""
    for index, (what, count) in enumerate((("prefill", PROMPT), ("decode", 1))):
        taken = {name: [each[index] for each in made] for name, made in times.items()}
        for name, seconds in taken.items():
            print(f"  {what} {name}: {count / statistics.median(seconds):.1f} tok/s")
        ratios = [a / b for a, b in zip(taken["raw"], taken["qgrid"], strict=True)]
        low, high = stats.bootstrap_median(ratios)
        middle = statistics.median(ratios)
        print(f"  {what} qgrid / raw: {middle:.3f} [{low:.3f}, {high:.3f}] (wanted: 0.97 or more)")
        for other in others:
            ratio = other[index] / statistics.median(taken["qgrid"])
            print(f"  {what} qgrid / llama-bench: {ratio:.3f} (wanted: 0.95 or more)")


def main() -> None:
    """Print all ratios."""
    as_in_a_worker()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.shapes:
            file = Path(folder) / f"{name}.gguf"
            random_gguf.write(file, SHAPES[name])
            before = reference(file, given.threads, given.tokens)
            times = compare(file, given.threads, given.tokens, given.pairs)
            after = reference(file, given.threads, given.tokens)
            print(f"{name}, {given.threads} threads")
            report(times, [each for each in (before, after) if each is not None])


if __name__ == "__main__":
    main()
