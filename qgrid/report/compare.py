"""Comparisons with the baseline: intervals, claims of speed, slices that fell. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from qgrid.types import Measurement

LEVEL = 0.05  # two-sided, as the 95 % intervals are
_Z95 = NormalDist().inv_cdf(1 - LEVEL / 2)


@dataclass(frozen=True)
class Ratio:
    """A ratio to the baseline with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_claimed(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1


def bounds(measurement: Measurement) -> tuple[float, float] | None:
    """The 95 % interval: as stored, else from the standard error, else None."""
    if measurement.low is not None and measurement.high is not None:
        return measurement.low, measurement.high
    if measurement.stderr is None:
        return None
    half = _Z95 * measurement.stderr
    return measurement.value - half, measurement.value + half


def clearly_above(value: Measurement, other: Measurement) -> bool:
    """Whether the intervals are apart; without both of them, whether it is larger at all."""
    mine, theirs = bounds(value), bounds(other)
    if mine is None or theirs is None:
        return value.value > other.value
    return mine[0] > theirs[1]


def half_width(measurement: Measurement) -> float | None:
    """Half the length of the 95 % interval."""
    interval = bounds(measurement)
    return None if interval is None else (interval[1] - interval[0]) / 2


def ratio(value: Measurement | None, base: Measurement | None) -> Ratio | None:
    """`value / base` of two independent positive numbers; None without both intervals.

    The distances of the bounds combine on the log scale (method of variance estimates recovery).
    """
    if value is None or base is None:
        return None
    mine, theirs = bounds(value), bounds(base)
    if mine is None or theirs is None or min(*mine, *theirs) <= 0:
        return None
    middle = math.log(value.value / base.value)
    down = math.hypot(math.log(value.value / mine[0]), math.log(theirs[1] / base.value))
    up = math.hypot(math.log(mine[1] / value.value), math.log(base.value / theirs[0]))
    return Ratio(math.exp(middle), math.exp(middle - down), math.exp(middle + up))


def p_value(change: Measurement) -> float | None:
    """Two-sided p of a change against zero, from its standard error or interval."""
    interval = bounds(change)
    if interval is None:
        return None
    stderr = change.stderr
    if stderr is None or stderr <= 0:
        stderr = (interval[1] - interval[0]) / (2 * _Z95)
    if stderr <= 0:
        return 1.0 if change.value == 0 else 0.0
    return 2 * NormalDist().cdf(-abs(change.value) / stderr)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: name -> adjusted p."""
    adjusted: dict[str, float] = {}
    running = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = running
    return adjusted


def fallen(changes: Mapping[str, Measurement], exact: Mapping[str, float]) -> list[str]:
    """Slices that fell: upper bound below 0, and p below 5 % after Holm over the cell's slices.

    `exact` holds one-sided McNemar p-values where they are known. The larger p counts, because
    the flips of few items are not normal, and the exact test does not know of documents.
    """
    p_values = {
        name: max(p, min(1.0, 2 * exact.get(name, 0.0)))
        for name, change in changes.items()
        if (p := p_value(change)) is not None
    }
    adjusted = holm(p_values)
    return [name for name, p in adjusted.items() if p < LEVEL and _is_below_zero(changes[name])]


def mean_change(changes: Sequence[Measurement]) -> Ratio | None:
    """Mean of the changes with its interval, the slices taken as independent; None without any."""
    halves = [half for change in changes if (half := half_width(change)) is not None]
    if not changes or len(halves) < len(changes):
        return None
    value = sum(change.value for change in changes) / len(changes)
    half = math.hypot(*halves) / len(changes)
    return Ratio(value, value - half, value + half)


def _is_below_zero(change: Measurement) -> bool:
    interval = bounds(change)
    return interval is not None and interval[1] < 0
