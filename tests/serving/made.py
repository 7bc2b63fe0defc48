"""Samples made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qgrid.serving.samples import Sample


def sample(arrivals: Sequence[float], sent: float = 0.0, **changes: Any) -> Sample:
    """A request of 10 prompt tokens with one token an arrival."""
    fields: dict[str, Any] = {
        "load": "concurrency=1",
        "repeat": 0,
        "number": 0,
        "scheduled": None,
        "sent": sent,
        "arrivals": tuple(arrivals),
        "prompt_tokens": 10,
        "output_tokens": len(arrivals),
        "counted": True,
    }
    return Sample(**(fields | changes))


def failed(**changes: Any) -> Sample:
    """A request that timed out."""
    return sample((), output_tokens=0, kind="timeout", error="POST x: too late", **changes)
