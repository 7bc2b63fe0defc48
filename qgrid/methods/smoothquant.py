"""SmoothQuant: W8A8, the range of large activations folded into weights before both are rounded.

Weights are int8 with a scale a row; activations are rounded to int8 while the model runs, with a
scale a token that is taken from the token itself. A runtime without an int8 product for them
unpacks the weights and rounds the activations in floating point: what it computes is W8A8, what it
takes is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from qgrid.contracts import Built
from qgrid.methods import _llmcompressor as llmc
from qgrid.types import Cell, Check, MethodSupport
from qgrid.weights import inspection, widths

SUPPORTS = MethodSupport(
    bits=(8,),
    default_bits=8,
    produces={8: "int-quantized"},
    packages=llmc.PACKAGES,
    calibrated=True,
)
_SCHEME: llmc.Scheme = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    },
}


@dataclass(frozen=True)
class Options:
    """`smoothing_strength`: 1: weights take all the range of activations; 0: the reverse."""

    smoothing_strength: Annotated[float, Field(ge=0, le=1)]
    keep: Mapping[str, int] | None


def refusal(cell: Cell) -> str | None:
    """Why layers cannot be left out as asked; None if they can."""
    return widths.refusal(cell, SUPPORTS.bits)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer: int8, and a 16-bit scale a row."""
    return bits + 16 / columns


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already.
    """
    options = Options(**cell.method.options)

    def recipe(arguments: Mapping[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smooth = SmoothQuantModifier(smoothing_strength=options.smoothing_strength)
        return [smooth, QuantizationModifier(**arguments)]

    built = llmc.quantize(cell, source, out, lambda _: _SCHEME, recipe)
    return replace(built, checks=(_check_smoothed(source, out),))


def _check_smoothed(source: Path, out: Path) -> Check:
    """Whether scales were folded into norms: a model without known places for them gets none.

    Two norms a layer feed linear layers; one more at the end feeds only the head. Norms of queries
    and keys are not smoothed either.
    """
    before, after = _norms(source), _norms(out)
    changed = [name for name, data in before.items() if after.get(name) != data]
    layers = {name.rpartition(".layers.")[2].split(".")[0] for name in before if ".layers." in name}
    told = f"{len(changed)} norms changed, in a model of {len(layers)} layers"
    goal = "activations' scales in the norms of every layer"
    return Check("smoothing", bool(layers) and len(changed) >= len(layers), goal, told)


def _norms(folder: Path) -> dict[str, bytes]:
    """The stored bytes of every one-dimensional weight."""
    found = {}
    for path in inspection.weight_files(folder):
        with path.open("rb") as file:
            for name, (tensor, start) in inspection.read_header(path).items():
                if len(tensor.shape) == 1 and name.endswith("norm.weight"):
                    file.seek(start)
                    found[name] = file.read(tensor.nbytes)
    return found
