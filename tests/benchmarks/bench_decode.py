"""Decode speed through qgrid against a plain `generate` loop, the same model, both in turn.

python tests/benchmarks/bench_decode.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

from qgrid import demo, stats
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Gpu, KvCache, Method, Model, Runtime, Slices, Workload

PROMPT, WARMUP = 64, 3


def cell(threads: int | None) -> Cell:
    """The 16-bit model on this CPU, or on its GPU where torch finds one."""
    import torch

    kind: Any = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"attn_implementation": "sdpa"}
    return Cell(
        model=Model("tiny", "qgrid/tiny", None, False, False),
        method=Method("none", {}),
        bits=16,
        runtime=Runtime("transformers", "float32", "bfloat16", threads, options),
        gpu=Gpu("here", kind, "", None, 8.0, None, 1),
        kv_cache=KvCache("auto16", 16),
        calibration=None,
        slices=Slices("none", None, {}),
        workload=Workload("none", PROMPT, 1, (1,), 2, 5),
        context=512,
        seed=0,
    )


def plain(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of the call that a reader would write."""
    import torch

    begin = time.perf_counter()
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def through_qgrid(engine: runtime.Transformers, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of the same request as qgrid times it, every token with its moment."""
    made = engine.generate(prompts, tokens)[0]
    assert len(made.ids) == tokens
    return made.seconds[-1]


def main() -> None:
    """Print both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=demo.MODEL_DIR)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    engine = runtime.load(given.model, cell(given.threads), "bfloat16")
    rng = random.Random(0)
    times: dict[str, list[float]] = {"plain": [], "qgrid": []}
    for pair in range(-WARMUP, given.pairs):
        prompts = [[rng.randrange(1000) for _ in range(PROMPT)]]
        for name in ("plain", "qgrid") if pair % 2 else ("qgrid", "plain"):
            run = plain if name == "plain" else through_qgrid
            subject: Any = engine._model if name == "plain" else engine
            seconds = run(subject, prompts, given.tokens)
            if pair >= 0:
                times[name].append(seconds)
    for name, seconds_ in times.items():
        print(f"{name}: {given.tokens / statistics.median(seconds_):.1f} tok/s")
    ratios = [a / b for a, b in zip(times["plain"], times["qgrid"], strict=True)]
    low, high = stats.bootstrap_median(ratios)
    middle = statistics.median(ratios)
    print(f"qgrid / plain: {middle:.3f} [{low:.3f}, {high:.3f}] (wanted: 0.97 to 1.03)")


if __name__ == "__main__":
    main()
