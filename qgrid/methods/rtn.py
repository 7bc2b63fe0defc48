"""Round to nearest: integer weights by group, no calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgrid.contracts import Built
from qgrid.methods import _llmcompressor as llmc
from qgrid.types import Cell, MethodSupport

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

    group_size: int | None
    symmetric: bool
    scheme: str | None


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that `scheme` implies, if any."""
    return llmc.scheme_bits(options["scheme"])


def linear_bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of a large linear layer, scales and zero points included."""
    return stored_bits(bits, options, 4096, 4096)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Stored bits per weight of one linear layer."""
    return llmc.stored_bits(llmc.weights(bits, options), rows, columns)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the packed checkpoint of `source` into `out`."""
    return llmc.quantize(cell, source, out, _recipe)


def _recipe(arguments: Mapping[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**arguments)]
