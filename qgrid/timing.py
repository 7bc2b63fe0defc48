"""When a timing counts: repeats that agree, and nobody else in the way of who measures. Pure."""

from __future__ import annotations

from qgrid.types import Measurement

UNSTABLE_CV = 0.05  # coefficient of variation of the repeats
BUSY = 0.1  # processors of others: one busy neighbour can cost a parallel step 98 % of its speed
MERGED = 0.25  # of the first tokens: read too late, TTFT is too long and TPOT too short
_LIMITS = {"timing_cv": UNSTABLE_CV, "busy_elsewhere": BUSY, "merged_first_tokens": MERGED}


FAILED = 0.01  # of the requests of a load: fewer users were served than its name says


def is_unstable(*measured: Measurement | None) -> bool:
    """Whether one of the measurements says that a timing is not to be compared."""
    return any(each is not None and _speaks_against(each) for each in measured)


def _speaks_against(found: Measurement) -> bool:
    if found.metric == "failed_requests":
        return found.n is not None and found.value > FAILED * found.n
    return found.metric in _LIMITS and found.value > _LIMITS[found.metric]
