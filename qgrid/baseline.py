"""What a cell's quality is compared with: the same cell at 16 bits with a 16-bit KV cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from qgrid import registry
from qgrid.types import Cell, KvCache, Method

UNQUANTIZED = 16
KV_CACHE = KvCache("auto16", 16)


def of(cell: Cell) -> Cell:
    """The baseline of `cell`, by the method that its runtime names; a baseline is its own."""
    method = _method(cell.runtime.name)
    return replace(cell, method=method, bits=UNQUANTIZED, kv_cache=KV_CACHE, calibration=None)


@cache
def _method(runtime: str) -> Method:
    """What makes the 16-bit weights that the runtime loads; one object, known to the plan by id."""
    name = registry.runtime(runtime).LOADS.baseline
    return Method(name, getattr(registry.method(name), "UNQUANTIZED", {}))
