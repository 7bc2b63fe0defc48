"""LLM.int8: eight-bit rows; activation columns beyond a threshold are multiplied at 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat

from qgrid.contracts import Built
from qgrid.methods import _bitsandbytes as bnb
from qgrid.published.bitsandbytes import PACKAGES
from qgrid.types import Cell, MethodSupport
from qgrid.weights import widths

SUPPORTS = MethodSupport(
    bits=(8,),
    default_bits=8,
    produces={8: "bitsandbytes-int8"},
    packages=PACKAGES,
    capability="sm_75",  # of LLM.int8: bitsandbytes' installation guide, 0.50
    calibrated=False,
    # its issue 1775; mended in 0.48.1 by its pull request 1776
    broken=(("bitsandbytes==0.48.0", "reads stored 8-bit checkpoints wrongly"),),
)


@dataclass(frozen=True)
class Options:
    """`threshold`: an activation beyond it sends its column through the 16-bit path."""

    threshold: NonNegativeFloat
    keep: Mapping[str, int] | None


def refusal(cell: Cell) -> str | None:
    """Why layers cannot be left out as asked; None if they can."""
    return widths.refusal(cell, SUPPORTS.bits)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Stored bits per weight of one linear layer: codes, an fp32 scale a row, a format byte."""
    return bits + (32 * rows + 8) / (rows * columns)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the 8-bit checkpoint of `source` into `out`."""
    options = Options(**cell.method.options)
    settings = {"load_in_8bit": True, "llm_int8_threshold": options.threshold}
    return bnb.quantize(cell, source, out, settings)
