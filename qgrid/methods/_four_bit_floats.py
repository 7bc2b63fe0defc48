"""Weights of four bits in E2M1, with scales of few bits: what NVFP4 and MXFP4 share.

A sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Two of them lie in a
byte. Activations stay at 16 bits, or are rounded to the same grid while the model runs. A runtime
without such products unpacks the weights and rounds the activations in floating point: what it
computes is 4 bits, what it takes is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qgrid import models
from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.methods import _llmcompressor as llmc
from qgrid.types import Cell, MethodSupport
from qgrid.weights import inspection, widths

BITS = (4,)


@dataclass(frozen=True)
class Options:
    """`activations`: round them to 4 bits as well."""

    activations: bool
    keep: Mapping[str, int] | None


def supports(name: str, calibrated: bool) -> MethodSupport:
    """What the method of a name makes."""
    return MethodSupport(
        bits=BITS,
        default_bits=4,
        produces={4: f"{name}-pack-quantized"},
        packages=llmc.PACKAGES,
        calibrated=calibrated,
    )


def refusal(group_size: int, cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    if reason := widths.refusal(cell, BITS):
        return reason
    source = models.known(cell.model)
    if source is None:
        return None
    return _indivisible(cell, source, group_size)


def _indivisible(cell: Cell, source: Path, group_size: int) -> str | None:
    """Which layers of a checkpoint the groups do not divide, and two ways out."""
    name, options = cell.method.name, cell.method.options
    odd = _odd(source, group_size)
    bad = [layer for layer in odd if widths.of(cell.bits, options, layer) in BITS]
    if not bad:
        return None
    first = ", ".join(f"{layer} ({odd[layer]} columns)" for layer in bad[:3])
    return (
        f"`method={name}` has groups of {group_size} columns, which do not divide {len(bad)} "
        f"layers: {first}{', ...' if len(bad) > 3 else ''}; leave them at 16 bits with "
        "`method.keep`, or use a method whose blocks run on from row to row"
    )


@cache
def _odd(source: Path, group_size: int) -> dict[str, int]:
    """Layers with columns left over, and how many columns they have."""
    linears = inspection.decoder_linears(inspection.read_headers(source))
    return {name: columns for name, (_, columns) in linears.items() if columns % group_size}


def quantize(cell: Cell, source: Path, out: Path, weights: dict[str, Any]) -> Built:
    """Write the checkpoint of `source` into `out`; `weights` describes them to the library.

    Raises:
        Unsupported: the source is quantized already, or groups do not divide its layers.
    """
    _checkpoint.refuse(_indivisible(cell, source, weights["group_size"]))
    scheme = {"weights": weights}
    if Options(**cell.method.options).activations:
        scheme["input_activations"] = weights | _WHILE_RUNNING[weights["strategy"]]
    return llmc.quantize(cell, source, out, lambda _: scheme, _recipe)


# Scales of groups are taken of each token; NVFP4's scale of the tensor is calibrated before.
_WHILE_RUNNING: dict[str, dict[str, Any]] = {
    "group": {"dynamic": True},
    "tensor_group": {"dynamic": "local", "observer": "static_minmax"},
}


def _recipe(arguments: Mapping[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**arguments)]
