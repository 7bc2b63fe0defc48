"""When a timing counts: repeats that agree, on processors that nobody else kept busy. Pure."""

from __future__ import annotations

from qgrid.types import Measurement

UNSTABLE_CV = 0.05  # coefficient of variation of the repeats
BUSY = 0.1  # processors of others: one busy neighbour can cost a parallel step 98 % of its speed
_LIMITS = {"timing_cv": UNSTABLE_CV, "busy_elsewhere": BUSY}


def is_unstable(*measured: Measurement | None) -> bool:
    """Whether one of the measurements says that a timing is not to be compared."""
    return any(
        each is not None and each.metric in _LIMITS and each.value > _LIMITS[each.metric]
        for each in measured
    )
