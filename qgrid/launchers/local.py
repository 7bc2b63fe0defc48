"""This machine: worker slots by device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveInt

REMOTE = False


@dataclass(frozen=True)
class Options:
    """`slots`: cells at once; None: one for each group of cards, or as cores and memory allow."""

    slots: PositiveInt | None


def launch(folder: Path, options: Options, detach: bool) -> int:
    """Run the cells of a sweep here; the exit code."""
    from qgrid import sweep

    return sweep.run_cells(str(folder / "plan.jsonl"), None)
