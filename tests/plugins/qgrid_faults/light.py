"""A runtime that needs no library: for cells that end before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from qgrid.contracts import Engine
from qgrid.types import Cell, RuntimeSupport
from qgrid_faults.runtime import Options

__all__ = ["LOADS", "Options", "load"]

LOADS = RuntimeSupport(
    loads={"cpu": ("safetensors-16bit",), "cuda": ("safetensors-16bit",)},
    kv_cache={"cpu": ("auto16",), "cuda": ("auto16",)},
    packages=(),
)


def load(artifact: Path, cell: Cell, dtype: str) -> Engine:
    raise NotImplementedError("this runtime loads nothing")
