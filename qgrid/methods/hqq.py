"""HQQ: codes of 1 to 8 bits whose zero points are fitted to the weights, no calibration.

A half-quadratic solver moves each group's zero point so that few weights are far off. A group is a
run of a row (`axis=1`), or of a column's weights at equal distances (`axis=0`). Scales and zero
points are kept in fp16, the library's own choice: in bf16 a zero point of 8 bits would be half a
step off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from qgrid import models
from qgrid.methods import _checkpoint, _layerwise
from qgrid.methods import _packed as packed
from qgrid.types import MethodSupport
from qgrid.weights import inspection, widths

if TYPE_CHECKING:
    from qgrid.contracts import Built
    from qgrid.types import Cell

# 5 and 6 bits, and 1.58, are there as well, but stored in whole bytes and as 2 bits.
_BITS = (1, 2, 3, 4, 8)
SUPPORTS = MethodSupport(
    bits=_BITS,
    default_bits=4,
    produces=dict.fromkeys(_BITS, "hqq"),
    packages=("hqq", "torch", "transformers", "accelerate"),
    calibrated=False,
)
_WORD_BITS, _WORD_CODES = 3, 10  # so many of so many bits lie in a word of 32
_PACKING = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 8: "8bit_u8"}


@dataclass(frozen=True)
class Options:
    """`group_size` None: one scale a row, or a column. `axis`: along which weights share it."""

    group_size: Annotated[int, Field(gt=0, multiple_of=8)] | None
    axis: Literal[0, 1]
    keep: Mapping[str, int] | None


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer: packed codes, two fp16 numbers a group, the shape."""
    length, groups = _grouping(options, rows, columns)
    lines, across = (groups, length) if options["axis"] == 1 else (length, groups)
    words = 32 * -(-lines // _WORD_CODES)
    codes = across * (words if bits == _WORD_BITS else bits * lines)
    return (codes + 2 * 16 * groups + 2 * 64) / (rows * columns)


def _grouping(options: Mapping[str, Any], rows: int, columns: int) -> tuple[int, int]:
    """Weights a group, and groups."""
    whole = columns if options["axis"] == 1 else rows
    length = whole if options["group_size"] is None else options["group_size"]
    return length, rows * columns // length


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    if reason := widths.refusal(cell, _BITS):
        return reason
    source = models.known(cell.model)
    return None if source is None else _unfit(cell, source)


def _unfit(cell: Cell, source: Path) -> str | None:
    """Groups that do not divide a layer, and codes that do not fill their bytes or words."""
    options = cell.method.options
    linears = widths.rounded(cell, source)
    if reason := packed.indivisible(linears, options["group_size"], options["axis"]):
        return reason
    for name, shape in linears.items():
        bits = widths.of(cell.bits, options, name)
        length, groups = _grouping(options, *shape)
        count = groups if options["axis"] == 1 else length
        if bits == _WORD_BITS:
            ragged, unit = 32 * -(-count // _WORD_CODES) >= 4 * count, f"{_WORD_CODES} in a word"
        else:
            ragged, unit = bool(count % (8 // bits)), f"{8 // bits} in a byte"
        if ragged:
            return (
                f"`method=hqq` packs codes of {bits} bits {unit}, which {count} along "
                f"`method.axis={options['axis']}` of {name} do not fill; use another "
                "`method.group_size` or `method.axis`"
            )
    return None


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the packed checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or a group does not divide its layers.
    """
    _checkpoint.refuse(_unfit(cell, source))
    options = Options(**cell.method.options)

    def apart(linear: Any, bits: int) -> dict[str, Any]:
        from hqq.core.quantize import Quantizer, hqq_base_quant_config

        length, _ = _grouping(cell.method.options, *linear.weight.shape)
        settings = hqq_base_quant_config(nbits=bits, group_size=length, axis=options.axis)
        codes, meta = Quantizer.quantize(
            linear.weight, device="cpu", **settings["weight_quant_params"]
        )
        return {"W_q": codes, "scale": meta["scale"].half(), "zero": meta["zero"].half()}

    into = _layerwise.Checkpoint(source, out, {"quant_method": "hqq", "axis": options.axis})
    return _layerwise.quantize(cell, into, apart, _rebuild(options.axis))


def load(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """The model of `folder` with layers that unpack their codes in every pass."""
    axis = inspection.quantization_config(folder)["axis"]
    return _layerwise.load(folder, arguments, _rebuild(axis))


def _rebuild(axis: int) -> _layerwise.Rebuild:
    """Make layers of the library from what is stored, computing in a dtype."""

    def rebuild(linear: Any, parts: Mapping[str, Any], dtype: Any) -> Any:
        import torch
        from hqq.core.quantize import HQQLinear, Quantizer

        codes, scale = parts["W_q"], parts["scale"]
        shape = torch.Size(parts["shape"].tolist())
        bits = _width(codes, shape, axis)
        layer = HQQLinear(
            None, None, compute_dtype=dtype, device=str(codes.device), initialize=False
        )
        layer.load_state_dict(
            {
                "W_q": torch.nn.Parameter(codes, requires_grad=False),
                "scale": scale,
                "zero": parts["zero"],
                "bias": parts.get("bias"),
                "shape": shape,
                "nbits": bits,
                "axis": axis,
                "group_size": shape.numel() // scale.numel(),
                "packing": _PACKING[bits],
                "unpack_view_dtype": Quantizer.unpack_view_dtype[_PACKING[bits]],
                "view_as_float": False,
                "quant_scale": False,
                "quant_zero": False,
            }
        )
        return layer

    return rebuild


def _width(codes: Any, shape: Any, axis: int) -> int:
    """Bits of a code by how many are in a byte; only those of three bits lie in words."""
    if codes.element_size() > 1:
        return _WORD_BITS
    return int(8 * codes.numel() // shape.numel())
