"""Several phrases in one line of a check or a message."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 3


def first(phrases: Sequence[str], between: str = "; ") -> str:
    """The first three of `phrases`, and how many more there are."""
    more = f" and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else ""
    return between.join(phrases[:_SHOWN]) + more
