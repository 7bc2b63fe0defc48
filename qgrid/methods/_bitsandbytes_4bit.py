"""What `nf4` and `fp4` share: codes of 16 fixed values, a scale for 64 weights, by bitsandbytes.

They differ in the 16 values alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgrid.contracts import Built
from qgrid.methods import _bitsandbytes as bnb
from qgrid.published import bitsandbytes as published
from qgrid.types import Cell, Check, MethodSupport
from qgrid.weights import widths

_BITS = (4,)


@dataclass(frozen=True)
class Options:
    """`double_quant` stores the scales themselves in 8 bits."""

    double_quant: bool
    keep: Mapping[str, int] | None


def supports(values: str) -> MethodSupport:
    """What the method with the 16 values of that name makes."""
    return MethodSupport(
        bits=_BITS,
        default_bits=4,
        produces={4: f"bitsandbytes-{values}"},
        packages=published.PACKAGES,
        capability="sm_60",  # of its 4-bit types: bitsandbytes' installation guide, 0.50
        calibrated=False,
    )


def refusal(cell: Cell) -> str | None:
    """Why layers cannot be left out as asked; None if they can."""
    return widths.refusal(cell, _BITS)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Stored bits per weight of one linear layer: codes, scales, the tables and the state."""
    return published.four_bit_width(rows * columns, options["double_quant"])


def checks(folder: Path, cell: Cell) -> Sequence[Check]:
    """Nothing was saved after a forward pass."""
    return published.checks(folder)


def quantize(cell: Cell, source: Path, out: Path, values: str) -> Built:
    """Write the 4-bit checkpoint of `source` into `out`; `values` names the 16 of them."""
    options = Options(**cell.method.options)
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": values,
        "bnb_4bit_use_double_quant": options.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    return bnb.quantize(cell, source, out, settings)
