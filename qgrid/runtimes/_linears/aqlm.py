"""Layers of aqlm: codes into codebooks."""

from __future__ import annotations

from typing import Any

from qgrid.layouts import aqlm as layout
from qgrid.runtimes._linears import Kernel, Stored

FORMATS = layout.FORMATS


def claims(module: Any) -> bool:
    """Whether a layer is aqlm's."""
    return type(module).__module__.startswith("aqlm.")


def stored(module: Any, plain: str | None) -> Stored:
    """The width of the codes alone."""
    return Stored("aqlm", _bits(module))


def kernel(module: Any, dtype: str) -> Kernel:
    """On a CPU the product of unpacked weights, which its loader chooses; see `published.aqlm`."""
    name = "torch" if module.codebooks.device.type == "cpu" else "cuda"
    return Kernel("aqlm", f"W{_bits(module)}A16", name, dtype)


def _bits(module: Any) -> int:
    weights = int(module.in_group_size) * int(module.out_group_size)
    return round(int(module.num_codebooks) * int(module.nbits_per_codebook) / weights)
