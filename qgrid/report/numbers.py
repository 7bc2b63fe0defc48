"""Numbers as a reader wants them in a table; the CSV keeps them whole."""

from __future__ import annotations

from collections.abc import Sequence

MIB, GIB = 2**20, 2**30


def plain(value: float) -> str:
    """Three or more significant digits: 1,234 / 131 / 56.2 / 1.34 / 0.0021 / 1.3e-05."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1 or size == 0:
        return f"{value:.2f}"
    return f"{value:.4f}" if size >= 1e-3 else f"{value:.1e}"


def points(share: float) -> str:
    """A change of a share as signed points: -6.2; a zero has no sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def percent(share: float) -> str:
    """A share as a percentage: 87.4%."""
    return f"{100 * share:.1f}%"


def plus_minus(half: float | None) -> str:
    """Half an interval of a share, in points: `±2.1`; nothing where it is unknown."""
    return "" if half is None else f"±{100 * half:.1f}"


def byte_unit(values: Sequence[float]) -> tuple[str, float]:
    """One unit for a column of bytes, by its largest value."""
    return ("GiB", GIB) if max(values, default=0) >= GIB else ("MiB", MIB)
