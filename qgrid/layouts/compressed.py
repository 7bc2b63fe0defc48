"""compressed-tensors: packed words or bytes of codes, or one-byte weights, beside their scales."""

from __future__ import annotations

import struct

from qgrid.layouts import Parts, Read

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
_ONE_BYTE = {"I8": "int-quantized", "F8_E4M3": "float-quantized"}
_FOUR_BIT_FLOATS = {  # by scales; powers of two are bytes, or floats that are all exponent
    "F8_E4M3": "nvfp4-pack-quantized",
    "U8": "mxfp4-pack-quantized",
    "F8_E8M0": "mxfp4-pack-quantized",
}


def format_of(parts: Parts) -> str | None:
    """By what holds the weights, and for bytes of two 4-bit floats by the dtype of the scales."""
    if "weight_packed" in parts:
        if parts["weight_packed"].dtype != "U8" or "weight_scale" not in parts:
            return "pack-quantized"
        return _FOUR_BIT_FLOATS.get(parts["weight_scale"].dtype)
    if "weight" in parts and "weight_scale" in parts:
        return _ONE_BYTE.get(parts["weight"].dtype)
    return None


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Kept as two integers beside words; bytes of 4-bit floats hold two columns each."""
    if "weight_shape" in parts:
        rows, columns = struct.unpack("<2q", read("weight_shape"))
        return int(rows), int(columns)
    if "weight_packed" in parts:
        rows, pairs = parts["weight_packed"].shape
        return rows, 2 * pairs
    rows, columns = parts["weight"].shape
    return rows, columns
