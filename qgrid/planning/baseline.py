"""What a cell's quality is compared with: the same cell at 16 bits with a 16-bit KV cache.

The kernel is the runtime's choice there: one that multiplies quantized weights has none for 16-bit
ones, and cells of several kernels compare with one baseline. An adapter that a cell keeps beside
its weights is merged into the baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from qgrid import registry
from qgrid.lora import adapters
from qgrid.types import Cell, KvCache, Method, Runtime

UNQUANTIZED = 16
KV_CACHE = KvCache("auto16", 16)
ANY_KERNEL = "auto"  # of the option `kernel`, which a runtime with several of them has


def of(cell: Cell) -> Cell:
    """The baseline of `cell`, by the method that its runtime names; a baseline is its own.

    So is a cell whose runtime knows no place where its model has 16 bits.
    """
    options = _options(cell.runtime)
    if options is None:
        return cell
    return replace(
        cell,
        model=adapters.merged(cell.model),
        method=_method(cell.runtime.name),
        bits=UNQUANTIZED,
        runtime=replace(cell.runtime, options=options),
        kv_cache=KV_CACHE,
        calibration=None,
    )


def _options(runtime: Runtime) -> Mapping[str, Any] | None:
    """Options of a baseline: by the runtime's hook, else the cell's own with any kernel."""
    own = getattr(registry.runtime(runtime.name), "baseline_options", None)
    if own is not None:
        found: Mapping[str, Any] | None = own(runtime.options)
        return found
    if runtime.options.get("kernel", ANY_KERNEL) == ANY_KERNEL:
        return runtime.options
    return {**runtime.options, "kernel": ANY_KERNEL}


@cache
def _method(runtime: str) -> Method:
    """What makes the 16-bit weights that the runtime loads; one object, known to the plan by id."""
    name = registry.runtime(runtime).LOADS.baseline
    return Method(name, getattr(registry.method(name), "UNQUANTIZED", {}))
