"""AWQ: scale the channels that activations use most before rounding, and fold the scales away."""

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
    calibrated=True,
)


@dataclass(frozen=True)
class Options:
    """`group_size` None: one scale a row. A `scheme` replaces `group_size` and `symmetric`."""

    group_size: PositiveInt | None
    symmetric: bool
    scheme: llmc.Scheme | None
    duo_scaling: bool
    grid_points: PositiveInt


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the packed checkpoint of `source` into `out`."""
    options = Options(**cell.method.options)

    def recipe(arguments: Mapping[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        search = AWQModifier(duo_scaling=options.duo_scaling, n_grid=options.grid_points)
        return [search, QuantizationModifier(**arguments)]

    return llmc.quantize(cell, source, out, recipe)
