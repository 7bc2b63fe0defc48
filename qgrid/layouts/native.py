"""The formats that GPTQ and AWQ brought with them: words of codes and zero points, fp16 scales."""

from __future__ import annotations

from qgrid.layouts import Parts, Read


def format_of(parts: Parts) -> str | None:
    """`gptq` packs along a row of weights, so that its codes are as wide as the scales."""
    if not {"qweight", "scales"} <= parts.keys():
        return None
    return "gptq" if parts["qweight"].shape[1] == parts["scales"].shape[1] else "awq"


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Rows by the scales; columns by the place that `gptq` keeps for each, or by `awq`'s words."""
    rows = parts["scales"].shape[1]
    places = parts.get("g_idx")
    return rows, parts["qweight"].shape[0] if places is None else places.shape[0]
