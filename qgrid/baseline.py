"""What a cell's quality is compared with: the same cell at 16 bits with a 16-bit KV cache."""

from __future__ import annotations

from dataclasses import replace

from qgrid.types import Cell, KvCache, Method

UNQUANTIZED = 16
METHOD = Method("none", {})
KV_CACHE = KvCache("auto16", 16)


def of(cell: Cell) -> Cell:
    """The baseline of `cell`; a baseline is its own."""
    names = (cell.method.name, cell.bits, cell.kv_cache.name)
    if names == (METHOD.name, UNQUANTIZED, KV_CACHE.name):
        return cell
    return replace(cell, method=METHOD, bits=UNQUANTIZED, kv_cache=KV_CACHE, calibration=None)
