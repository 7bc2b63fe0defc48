"""Layers of hqq, which unpack their codes in every pass."""

from __future__ import annotations

from typing import Any

from qgrid.layouts import hqq as layout
from qgrid.runtimes._linears import Kernel, Stored

FORMATS = layout.FORMATS
PACKAGES = ("hqq",)


def claims(module: Any) -> bool:
    """By its class."""
    return type(module).__module__.startswith("hqq.") and hasattr(module, "W_q")


def stored(module: Any, plain: str | None) -> Stored:
    """By the bytes of the codes; what a code of three bits wastes in its word is not counted."""
    return Stored("hqq", _bits(module))


def kernel(module: Any, dtype: str) -> Kernel:
    """The library's backend: it unpacks, then multiplies in its own dtype."""
    computed = str(module.compute_dtype).removeprefix("torch.")
    name = f"hqq-{module.backend.name.lower()}"
    return Kernel("hqq", f"W{_bits(module)}A16", name, computed)


def _bits(module: Any) -> int:
    rows, columns = module.meta["shape"]
    return int(8 * module.W_q.numel() * module.W_q.element_size() // (rows * columns))
