"""MXFP4: four-bit floats, a power of two as the scale of 32 of a row (E8M0: an exponent alone)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qgrid.contracts import Built
from qgrid.methods import _four_bit_floats as floats
from qgrid.types import Cell

SUPPORTS = replace(
    floats.supports("mxfp4", calibrated=False),
    # seen in vLLM's pull request 35979: perplexity 22,953 instead of 8.74; mended in 0.14
    broken=(("compressed-tensors==0.13.*", "makes MXFP4 weights four times too small"),),
)
Options = floats.Options
_GROUP = 32
refusal = partial(floats.refusal, _GROUP)
_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": _GROUP,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer: codes, and a byte a group."""
    return bits + 8 / _GROUP


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or groups do not divide its layers.
    """
    return floats.quantize(cell, source, out, _WEIGHTS)
