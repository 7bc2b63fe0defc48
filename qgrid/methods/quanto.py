"""quanto: int8 or floats of a byte by row, int4 and int2 by group; no calibration.

Codes are rounded in fp32. Left to itself the library rounds in the model's bf16, and on a CPU it
packs int4 for a kernel at once, from which the zero points do not come back whole when they are
saved. The folder is one that the library's own `QuantizedModelForCausalLM` loads as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qgrid.libraries import quanto_library
from qgrid.methods import _layerwise
from qgrid.types import MethodSupport
from qgrid.weights import inspection, widths

if TYPE_CHECKING:
    from qgrid.contracts import Built
    from qgrid.types import Cell

_BITS = (2, 4, 8)
_FLOAT_BITS = (8,)
SUPPORTS = MethodSupport(
    bits=_BITS,
    default_bits=8,
    produces=dict.fromkeys(_BITS, "quanto-int"),
    packages=("optimum-quanto", "torch", "transformers", "accelerate"),
    calibrated=False,
)
_FLOATS = {"float8": "qfloat8_e4m3fn", "float8_e5m2": "qfloat8_e5m2"}
_GROUPS = (128, 96, 64, 32)  # that the library tries, where a row is longer than the first
_MAP = "quanto_qmap.json"
_INT4, _INT8 = 4, 8
_UNIT = 16  # rows of int4 and columns of int8 that torch's products with bf16 take at once


@dataclass(frozen=True)
class Options:
    """`weights`: `float8` is E4M3. How many weights share a scale is the library's own choice."""

    weights: Literal["int", "float8", "float8_e5m2"]
    keep: Mapping[str, int] | None


def support(options: Mapping[str, Any]) -> MethodSupport:
    """Floats have eight bits only."""
    if options["weights"] not in _FLOATS:
        return SUPPORTS
    return replace(SUPPORTS, bits=_FLOAT_BITS, produces=dict.fromkeys(_FLOAT_BITS, "quanto-float"))


def refusal(cell: Cell) -> str | None:
    """Why single layers cannot have the widths that are asked for; None if they can."""
    return widths.refusal(cell, support(cell.method.options).bits)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer: codes, 16-bit scales and shifts, two more scales, the shape."""
    weights = rows * columns
    around = 2 * 16 + 2 * 64
    if bits == 8:
        return (8 * weights + 16 * rows + around) / weights
    length = _group(columns)
    groups = weights // length
    packed = -(-groups // (8 // bits)) * length
    return (8 * packed + 2 * 16 * groups + around) / weights


def _group(columns: int) -> int:
    """Columns that share a scale: the library's choice, the whole row where none of it divides."""
    if columns <= _GROUPS[0]:
        return columns
    return next((size for size in _GROUPS if columns % size == 0), columns)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already.
    """
    options = Options(**cell.method.options)

    def apart(linear: Any, bits: int) -> dict[str, Any]:
        return _stored(linear, _name(options.weights, bits))

    described = {"quant_method": "quanto", "weights": options.weights}
    into = _layerwise.Checkpoint(source, out, described)
    built = _layerwise.quantize(cell, into, apart, _rebuild(options.weights))
    _write_map(out, options.weights)
    return built


def load(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """The model of `folder`, its scales in the dtype that it is to compute in."""
    weights = inspection.quantization_config(folder)["weights"]
    return _layerwise.load(folder, arguments, _rebuild(weights))


def _name(weights: str, bits: int) -> str:
    """The library's name of a type."""
    return _FLOATS.get(weights, f"qint{bits}")


def _write_map(out: Path, weights: str) -> None:
    """The table of layers that the library's own loader reads."""
    layers = inspection.quantization_config(out)["layers"]
    table = {
        name: {"weights": _name(weights, bits), "activations": "none"}
        for name, bits in layers.items()
    }
    (out / _MAP).write_text(json.dumps(table, indent=1), encoding="utf-8")


def _stored(linear: Any, kind: str) -> dict[str, Any]:
    """What the library stores of a layer, its scales in the layer's 16-bit dtype."""
    dtype = linear.weight.dtype
    layer = quanto_library.library().nn.QLinear.from_module(linear.float(), weights=kind)
    layer.freeze()
    parts = {key: _cast(part, dtype) for key, part in layer.state_dict().items() if key != "bias"}
    if "weight._data" in parts and parts["weight._data"].is_floating_point():
        # A row of zeros has the scale 0, and 0 / 0 is no zero of a float.
        empty = (parts["weight._scale"] == 0).expand_as(parts["weight._data"])
        codes = parts["weight._data"].float().masked_fill(empty, 0)
        parts["weight._data"] = codes.to(parts["weight._data"].dtype)
    return parts


def _rebuild(weights: str) -> _layerwise.Rebuild:
    """Make layers of the library from what is stored, computing in a dtype."""

    def rebuild(linear: Any, parts: Mapping[str, Any], dtype: Any) -> Any:
        import torch

        rows, columns = parts["shape"].tolist()
        codes = parts.get("weight._data._data", parts.get("weight._data"))
        width = 8 if "weight._data" in parts else _packed_width(codes, rows * columns)
        plain = torch.nn.Linear(columns, rows, "bias" in parts, device="meta", dtype=dtype)
        layer = quanto_library.library().nn.QLinear.from_module(
            plain, weights=_name(weights, width)
        )
        own = {key: _cast(part, dtype) for key, part in parts.items() if key != "shape"}
        if width == _INT4 and rows % _UNIT:
            _put_packed(layer, own)
        else:
            layer.load_state_dict(own, assign=True)
        ragged = width == _INT8 and columns % _UNIT
        if ragged or type(layer.weight).__name__ == "WeightQBitsTensor":
            layer.forward = partial(_unpacked, layer)
        return layer

    return rebuild


def _put_packed(layer: Any, parts: dict[str, Any]) -> None:
    """Put codes into a layer as they are: the library would pack them for torch's product first."""
    import torch

    weight = quanto_library.library().WeightQBitsTensor.load_from_state_dict(
        parts,
        "weight.",
        qtype=layer.weight_qtype,
        axis=0,
        group_size=layer.weight_group_size,
        size=layer.weight.size(),
        stride=layer.weight.stride(),
        missing_keys=[],
    )
    for name, part in {**parts, "weight": weight}.items():  # the rest: scales of activations, bias
        is_buffer = name.endswith("_scale")
        setattr(layer, name, part if is_buffer else torch.nn.Parameter(part, requires_grad=False))


def _unpacked(layer: Any, given: Any) -> Any:
    """The product of a layer whose codes no kernel multiplies as it should.

    The library's own, of the same unpacked weights, fails in torch's inference mode for 2 and 4
    bits (0.2.7: "Cannot set version_counter for inference tensor"). In bf16 on a CPU it has torch
    multiply int8, which reads beyond rows that are no multiple of 16 long (2.13).
    """
    import torch

    return torch.nn.functional.linear(given, layer.weight.dequantize(), layer.bias)


def _cast(part: Any, dtype: Any) -> Any:
    """Scales and shifts in `dtype`; codes as they are, also where they are floats of a byte."""
    return part.to(dtype) if part.is_floating_point() and part.element_size() > 1 else part


def _packed_width(codes: Any, weights: int) -> int:
    return int(8 * codes.numel() // weights)
