"""When a timing counts: repeats that agree, on processors that nobody else kept busy. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from qgrid.types import Measurement

UNSTABLE_CV = 0.05  # coefficient of variation of the repeats
BUSY = 0.1  # processors of others: one busy neighbour can cost a parallel step 98 % of its speed


def is_unstable(spread: Measurement | None, others: Measurement | None) -> bool:
    """Whether a timing is not to be compared: `timing_cv`, `busy_elsewhere`."""
    return _above(spread, UNSTABLE_CV) or _above(others, BUSY)


def any_unstable(measurements: Iterable[Measurement]) -> bool:
    """Whether a cell holds a timing that is not to be compared."""
    limits = {"timing_cv": UNSTABLE_CV, "busy_elsewhere": BUSY}
    return any(_above(each, limits[each.metric]) for each in measurements if each.metric in limits)


def _above(measured: Measurement | None, limit: float) -> bool:
    return measured is not None and measured.value > limit
