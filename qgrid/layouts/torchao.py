"""torchao: one-byte weights with a scale a row, and a zero point of int8 that is zero."""

from __future__ import annotations

from qgrid.layouts import Parts, Read

FORMATS = ("torchao-int8", "torchao-float8")
_WEIGHT = "_weight_qdata"
_KIND = {"I8": "torchao-int8", "F8_E4M3": "torchao-float8"}


def format_of(parts: Parts) -> str | None:
    """By the dtype of the weights, whatever width the checkpoint's config names."""
    if _WEIGHT not in parts or "_weight_scale" not in parts:
        return None
    return _KIND.get(parts[_WEIGHT].dtype)


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """The weights' own."""
    rows, columns = parts[_WEIGHT].shape
    return rows, columns
