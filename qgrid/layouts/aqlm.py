"""AQLM: codes into codebooks of short runs of weights, whose sums are scaled by row."""

from __future__ import annotations

from qgrid.layouts import Parts, Read

FORMATS = ("aqlm",)


def format_of(parts: Parts) -> str | None:
    """`aqlm`."""
    return "aqlm" if {"codes", "codebooks", "scales"} <= parts.keys() else None


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Places of codes, times the rows and columns that one entry of a codebook covers."""
    rows, columns, _ = parts["codes"].shape
    _, _, high, wide = parts["codebooks"].shape
    return rows * high, columns * wide
