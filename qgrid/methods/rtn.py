"""Round to nearest: integer weights by group, no calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from qgrid.contracts import Built
from qgrid.methods import _llmcompressor as llmc
from qgrid.methods._llmcompressor import (
    linear_bits_per_weight,
    option_bits,
    refusal,
    stored_bits,
)
from qgrid.types import Cell, MethodSupport

__all__ = [
    "SUPPORTS",
    "Options",
    "linear_bits_per_weight",
    "option_bits",
    "quantize",
    "refusal",
    "stored_bits",
]

BITS = (2, 3, 4, 8)
SUPPORTS = MethodSupport(
    bits=BITS,
    default_bits=4,
    produces=dict.fromkeys(BITS, llmc.FORMAT),
    packages=llmc.PACKAGES,
    calibrated=False,
)


@dataclass(frozen=True)
class Options:
    """`group_size` None: one scale a row. A `scheme` replaces the other two."""

    group_size: PositiveInt | None
    symmetric: bool
    scheme: llmc.Scheme | None


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the packed checkpoint of `source` into `out`."""
    return llmc.quantize(cell, source, out, _recipe)


def _recipe(arguments: Mapping[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**arguments)]
