"""The transformers runtime, which fails in the quality or the speed stage on request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import qgrid_faults
from qgrid.contracts import Engine
from qgrid.runtimes import transformers
from qgrid.types import Cell, RuntimeSupport

LOADS = RuntimeSupport(
    loads=transformers.LOADS.loads,
    kv_cache=transformers.LOADS.kv_cache,
    packages=("torch", "transformers"),
)


@dataclass(frozen=True)
class Options:
    quality: str
    speed: str


def load(artifact: Path, cell: Cell, dtype: str) -> Engine:
    stage = "quality" if dtype == cell.runtime.dtype else "speed"
    qgrid_faults.act(cell.runtime.options[stage])
    real = replace(cell.runtime, options={"attn_implementation": "sdpa"})
    return transformers.load(artifact, replace(cell, runtime=real), dtype)
