"""hqq: packed codes beside a 16-bit scale and zero point a group, and the layer's shape."""

from __future__ import annotations

import struct

from qgrid.layouts import Parts, Read

FORMATS = ("hqq",)


def format_of(parts: Parts) -> str | None:
    """`hqq` in every width: how many bits a code has shows in the size of the packed ones."""
    return "hqq" if {"W_q", "scale", "zero"} <= parts.keys() else None


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Kept as two integers: groups need not lie along a row."""
    if "shape" not in parts:
        return None
    rows, columns = struct.unpack("<2q", read("shape"))
    return int(rows), int(columns)
