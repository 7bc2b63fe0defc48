"""Checkpoints of the embedded model in every format that vLLM loads here, and their cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qgrid import demo, models, registry
from qgrid.types import Cell, Method, Model, Runtime, Workload
from tests import jobs

OPTIONS: dict[str, Any] = {
    "kernel": "auto",
    "kv_cache_gib": 0.125,
    "gpu_memory_utilization": 0.9,
    "max_num_batched_tokens": None,
    "enforce_eager": None,
}
# Name -> method, bits, changes of its options.
MADE: dict[str, tuple[str, int, dict[str, Any]]] = {
    "none": ("none", 16, {}),
    "rtn4": ("rtn", 4, {}),
    "rtn4_zeros": ("rtn", 4, {"symmetric": False}),
    "rtn4_row": ("rtn", 4, {"group_size": None}),
    "gptq4": ("gptq", 4, {"format": "gptq", "group_size": 64}),
    "awq4": ("awq", 4, {"format": "awq", "group_size": 64, "symmetric": False}),
    "smoothquant": ("smoothquant", 8, {}),
    "fp8": ("fp8", 8, {}),
    "rtn8": ("rtn", 8, {}),
    "rtn3": ("rtn", 3, {}),
    "fp8_static": ("fp8", 8, {"scheme": "static"}),
    "gptq8": ("gptq", 8, {"format": "gptq", "group_size": 64}),
    "gptq4_zeros": ("gptq", 4, {"format": "gptq", "group_size": 64, "symmetric": False}),
}
FOUR_BITS = ("rtn4", "rtn4_zeros", "rtn4_row", "gptq4", "awq4")
LOADED = ("none", *FOUR_BITS, "smoothquant", "fp8")
REFUSED = ("rtn8", "rtn3", "fp8_static", "gptq8", "gptq4_zeros")

Make = Callable[..., Cell]


@dataclass(frozen=True)
class Checkpoint:
    """A folder and the cell that it was made for."""

    folder: Path
    cell: Cell


def cell(make: Make, name: str, **options: Any) -> Cell:
    """The cell of a checkpoint on this runtime; keywords change the runtime's options."""
    method, bits, changes = MADE[name]
    return make(
        model=Model("tiny", "qgrid/tiny", None, False, False),
        method=Method(method, jobs.options(method, **changes)),
        bits=bits,
        runtime=Runtime("vllm", "bfloat16", "bfloat16", 1, OPTIONS | options),
        context=300,
        workload=Workload("test", 64, 24, (1, 4), 2, 5),
    )


def build(make: Make, name: str, store: Path) -> Checkpoint:
    """Quantize the embedded model, calibrated on its own prose."""
    wanted = cell(make, name)
    if registry.support(wanted.method).calibrated:
        prose = store / "prose.txt"
        prose.write_text(demo_prose()[:60_000])
        rows = 4 if "format" in wanted.method.options else 16  # AWQ's search takes long
        wanted = replace(wanted, calibration=jobs.calibration(prose, samples=rows, length=128))
    folder = store / name
    folder.mkdir()
    registry.method(wanted.method.name).quantize(wanted, demo.MODEL_DIR, folder)
    return Checkpoint(folder, wanted)


def demo_prose() -> str:
    """Text that the embedded model knows how to continue."""
    return models.resource("package:qgrid.demo/slices/prose.txt").read_text(encoding="utf-8")
