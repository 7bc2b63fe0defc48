"""Integer weights by group: what the options mean, what a layer takes, what does not divide.

`rtn`, `gptq` and `awq` store such weights. In compressed-tensors' layout `pack-quantized` every row
is a run of 32-bit words, beside a 16-bit scale a group, zero points where it is not symmetric, and
the shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from qgrid import models
from qgrid.methods import _checkpoint
from qgrid.methods import _llmcompressor as llmc
from qgrid.types import Cell, MethodSupport
from qgrid.weights import widths

Scheme = Literal["W2A16", "W3A16", "W4A16", "W8A16", "W4A16_ASYM"]  # presets of the library
FORMAT = "pack-quantized"
BITS = (2, 3, 4, 8)
_SCHEME_GROUP = 128  # columns a scale covers in every integer preset of compressed-tensors
_GROUPS = (128, 64, 32, 16)  # to suggest


@dataclass(frozen=True)
class Options:
    """`group_size` None: one scale a row. A `scheme` replaces `group_size` and `symmetric`."""

    group_size: PositiveInt | None
    symmetric: bool
    scheme: Scheme | None
    keep: Mapping[str, int] | None


@dataclass(frozen=True)
class Weights:
    """How a linear layer's weights are stored. `group_size` None: one scale a row."""

    bits: int
    group_size: int | None
    symmetric: bool


def supports(calibrated: bool) -> MethodSupport:
    """What a method makes that stores such weights through llmcompressor."""
    return MethodSupport(
        bits=BITS,
        default_bits=4,
        produces=dict.fromkeys(BITS, FORMAT),
        packages=llmc.PACKAGES,
        calibrated=calibrated,
    )


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that `scheme` implies, if any."""
    scheme = options["scheme"]
    return None if scheme is None else int(scheme[1])


def weights(bits: int, options: Mapping[str, Any]) -> Weights:
    """Resolve the options; a preset scheme replaces `group_size` and `symmetric`."""
    scheme = options["scheme"]
    if scheme is None:
        return Weights(bits, options["group_size"], options["symmetric"])
    return Weights(bits, _SCHEME_GROUP, symmetric=not scheme.endswith("_ASYM"))


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one packed layer: 32-bit words, 16-bit scales, zero points, the shape."""
    stored = weights(bits, options)
    groups = 1 if stored.group_size is None else -(-columns // stored.group_size)
    codes = rows * _words(columns * bits)
    zeros = 0 if stored.symmetric else groups * _words(rows * bits)
    return (codes + 16 * rows * groups + zeros + 128) / (rows * columns)


def _words(bits: int) -> int:
    """Bits in whole 32-bit words."""
    return 32 * -(-bits // 32)


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so, with two ways out; None if it can.

    Also None while the model is not on this machine: `quantize` asks again.
    """
    if reason := widths.refusal(cell, BITS):
        return reason
    source = models.known(cell.model)
    if source is None:
        return None
    return _indivisible(cell, source)


def refuse(cell: Cell, source: Path) -> None:
    """Refuse a checkpoint whose layers the cell's groups do not divide.

    Raises:
        Unsupported: names the layers and two ways out.
    """
    _checkpoint.refuse(_indivisible(cell, source))


def _indivisible(cell: Cell, source: Path) -> str | None:
    group_size = weights(cell.bits, cell.method.options).group_size
    return indivisible(widths.rounded(cell, source), group_size)


def indivisible(
    linears: Mapping[str, tuple[int, int]], group_size: int | None, axis: int = 1
) -> str | None:
    """Which layers (by name: rows, columns) a group does not divide, and the two ways out.

    `axis` 1: groups are runs of a row; 0: of a column.
    """
    across, line = ("columns", "row") if axis == 1 else ("rows", "column")
    lengths = {name: shape[axis] for name, shape in linears.items()}
    bad = [name for name, length in lengths.items() if group_size and length % group_size]
    if not bad:
        return None
    fits = next((g for g in _GROUPS if not any(each % g for each in lengths.values())), None)
    first = ", ".join(f"{name} ({lengths[name]} {across})" for name in bad[:3])
    smaller = f"`method.group_size={fits}` (divides all)" if fits else "a divisor of all"
    return (
        f"`method.group_size={group_size}` does not divide the {across} of {len(bad)} "
        f"layers: {first}{', ...' if len(bad) > 3 else ''}; use {smaller} or "
        f"`method.group_size=null` (one scale a {line})"
    )


def scheme(bits: int, options: Mapping[str, Any]) -> llmc.Scheme:
    """Weights of a width in llmcompressor's words; activations stay as they are."""
    stored = weights(bits, options)
    grouped = stored.group_size is not None
    return {
        "weights": {
            "num_bits": stored.bits,
            "type": "int",
            "symmetric": stored.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": stored.group_size,
        }
    }
