"""How many of the measured tokens had one before them that the KV cache holds quantized.

What is short is read without: its numbers are then those of a cache of 16 bits, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qgrid.types import Check

if TYPE_CHECKING:
    from qgrid.contracts import Engine

LEAST = 0.1  # below this share a slice says next to nothing about the cache


class Watch:
    """Counts what engines compute while it is held, from where their own counters stand."""

    def __init__(self, engine: Engine) -> None:
        self._begun: list[tuple[Engine, tuple[int, int]]] = []
        self.add(engine)

    def add(self, engine: Engine) -> Engine:
        """Watch another engine of the same cell as well."""
        found = _counted(engine)
        if found is not None:
            self._begun.append((engine, found))
        return engine

    def share(self) -> float | None:
        """The share of tokens since then; None where no engine counts, or computed none."""
        every = [(_counted(engine) or before, before) for engine, before in self._begun]
        total, quantized = (sum(now[i] - before[i] for now, before in every) for i in range(2))
        return quantized / total if total else None


def checks(shares: Mapping[str, float]) -> tuple[Check, ...]:
    """A remark on the slices that were measured (nearly) without the quantized cache."""
    if not shares:
        return ()
    short = {name: share for name, share in shares.items() if share < LEAST}
    told = ", ".join(f"{100 * share:.2g} % of `{name}`" for name, share in short.items())
    goal = f"quantized tokens before at least {100 * LEAST:.0f} % of each slice's measured tokens"
    return (Check("kv_rows", not short, goal, told or "so in every slice", fatal=False),)


def _counted(engine: Engine) -> tuple[int, int] | None:
    own = getattr(engine, "kv_rows", None)
    found: tuple[int, int] | None = None if own is None else own()
    return found
