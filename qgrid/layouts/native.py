"""The formats that GPTQ and AWQ brought with them: words of codes and zero points, fp16 scales."""

from __future__ import annotations

from qgrid.layouts import Parts, Read

FORMATS = ("gptq", "awq")
_WORD = 32


def format_of(parts: Parts) -> str | None:
    """`gptq` packs along a row of weights, so that its codes are as wide as the scales."""
    if not {"qweight", "scales"} <= parts.keys():
        return None
    if not all(len(parts[name].shape) == 2 for name in ("qweight", "scales")):
        return None  # malformed
    return "gptq" if parts["qweight"].shape[1] == parts["scales"].shape[1] else "awq"


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Rows by the scales; columns by the place that `gptq` keeps for each, or by the words.

    A word holds 32 bits of codes: `awq` packs rows; of `gptq` without places the zero points, a
    row of them for a group, tell the bits of a code.
    """
    rows, words = parts["scales"].shape[1], parts["qweight"].shape[0]
    if "g_idx" in parts:
        return rows, parts["g_idx"].shape[0]
    if format_of(parts) == "awq":
        return rows, words
    zeros = parts.get("qzeros")
    if zeros is None or len(zeros.shape) != 2 or not rows:
        return None
    bits = _WORD * zeros.shape[1] // rows
    return (rows, words * _WORD // bits) if bits else None
