"""Round to nearest: integer weights by group, no calibration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qgrid.contracts import Built
from qgrid.methods import _llmcompressor as llmc
from qgrid.methods import _packed as packed
from qgrid.types import Cell

SUPPORTS = packed.supports(calibrated=False)
Options = packed.Options
option_bits = packed.option_bits
stored_bits = packed.stored_bits
refusal = packed.refusal


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the packed checkpoint of `source` into `out`."""
    packed.refuse(cell, source)
    scheme = partial(packed.scheme, options=cell.method.options)
    return llmc.quantize(cell, source, out, scheme, _recipe)


def _recipe(arguments: Mapping[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**arguments)]
