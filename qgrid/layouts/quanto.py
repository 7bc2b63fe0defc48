"""optimum-quanto: bytes with a scale a row, or packed codes with a scale and a shift a group."""

from __future__ import annotations

import struct

from qgrid.layouts import Parts, Read

FORMATS = ("quanto-int", "quanto-float")
_BYTES = "weight._data"
_PACKED = "weight._data._data"
_KIND = {"I8": "quanto-int", "F8_E4M3": "quanto-float", "F8_E5M2": "quanto-float"}


def format_of(parts: Parts) -> str | None:
    """`quanto-int` in every width, packed or not; `quanto-float` of one-byte floats."""
    if "weight._scale" not in parts:
        return None
    if _PACKED in parts:
        return "quanto-int"
    return _KIND.get(parts[_BYTES].dtype) if _BYTES in parts else None


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Of bytes their own; kept as two integers where a row is cut into groups."""
    if _PACKED not in parts:
        rows, columns = parts[_BYTES].shape
    elif "shape" in parts:
        rows, columns = struct.unpack("<2q", read("shape"))
    else:
        return None
    return int(rows), int(columns)
