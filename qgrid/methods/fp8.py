"""FP8: weights and activations in E4M3: a sign, four bits of exponent, three of mantissa.

`dynamic` keeps a scale a row and takes one a token while the model runs; `static` has one scale a
tensor, the activations' from calibration; `block` keeps a scale for 128 x 128 weights and takes one
for 128 channels of a token. A runtime without FP8 products unpacks the weights and rounds the
activations in floating point: what it computes is FP8, what it takes is not.

There is no E5M2 here: compressed-tensors 0.19.0 has one FP8 type, and it is E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qgrid import models
from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.methods import _llmcompressor as llmc
from qgrid.types import Cell, MethodSupport
from qgrid.weights import widths

SUPPORTS = MethodSupport(
    bits=(8,),
    default_bits=8,
    produces={8: "float-quantized"},
    packages=llmc.PACKAGES,
    calibrated=True,
)
_BLOCK = 128
_E4M3: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
_SCHEMES: dict[str, llmc.Scheme] = {
    "dynamic": {
        "weights": _E4M3 | {"strategy": "channel"},
        "input_activations": _E4M3 | {"strategy": "token", "dynamic": True},
    },
    "static": {
        "weights": _E4M3 | {"strategy": "tensor"},
        "input_activations": _E4M3 | {"strategy": "tensor", "dynamic": False},
    },
    "block": {
        "weights": _E4M3 | {"strategy": "block", "block_structure": [_BLOCK, _BLOCK]},
        "input_activations": _E4M3 | {"strategy": "group", "group_size": _BLOCK, "dynamic": True},
    },
}


@dataclass(frozen=True)
class Options:
    """`scheme`: what shares a scale, and whether the activations' is calibrated."""

    scheme: Literal["dynamic", "static", "block"]
    keep: Mapping[str, int] | None


def calibrates(options: Mapping[str, Any]) -> bool:
    """Only static scales of activations need the calibration text."""
    return bool(options["scheme"] == "static")


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer: a byte a weight, and its 16-bit scales."""
    scales = {
        "dynamic": rows,
        "static": 2,  # of the weights, and of the activations
        "block": -(-rows // _BLOCK) * -(-columns // _BLOCK),
    }
    return bits + 16 * scales[options["scheme"]] / (rows * columns)


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    if reason := widths.refusal(cell, SUPPORTS.bits):
        return reason
    source = models.known(cell.model)
    if source is None:
        return None
    return _refused(cell, source)


def _refused(cell: Cell, source: Path) -> str | None:
    if cell.method.options["scheme"] != "block":
        return None
    linears = widths.rounded(cell, source)
    bad = [name for name, shape in linears.items() if any(size % _BLOCK for size in shape)]
    if not bad:
        return None
    first = ", ".join(f"{name} ({' x '.join(map(str, linears[name]))})" for name in bad[:3])
    return (
        f"`method.scheme=block` has blocks of {_BLOCK} x {_BLOCK}, which do not divide {len(bad)} "
        f"layers: {first}{', ...' if len(bad) > 3 else ''}; use `method.scheme=dynamic`"
    )


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or blocks do not divide its layers.
    """
    scheme = Options(**cell.method.options).scheme
    _checkpoint.refuse(_refused(cell, source))
    return llmc.quantize(cell, source, out, lambda _: _SCHEMES[scheme], _recipe)


def _recipe(arguments: Mapping[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**arguments)]
