"""Who needs what of a store: records and plans by artifact, and the cells at work right now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qgrid import codec
from qgrid.store import glance, leases
from qgrid.types import PlannedCell

NEVER_RAN = ("unsupported", "does_not_fit")  # statuses of cells that have no artifact of their own
FSCK = "`python -m qgrid fsck` says what to do about it"


class Unknown(ValueError):
    """A record or a plan that cannot be read, so that nobody knows what it needs."""


def artifacts(store: Path) -> dict[str, str]:
    """The artifacts that a record stands on or that a plan will use, and for each one who it is.

    A plan needs what its cells will use until they have records, and then these need it.

    Raises:
        Unknown: a record or a plan cannot be read.
    """
    needed: dict[str, str] = {}
    for file in sorted((store / "cells").glob("*/record.json")):
        record = _record(file)
        if record["status"] not in NEVER_RAN:
            for artifact_id in (record["artifact_id"], *_compared_with(record)):
                needed.setdefault(artifact_id, f"cell {file.parent.name}")
    for plan in plans(store):
        for cell in _planned(plan):
            if cell.status is None:
                needed.setdefault(cell.artifact_id, f"sweep {plan.parent.name}")
    return needed


def plans(store: Path) -> list[Path]:
    """The plans of all sweeps."""
    return sorted((store / "sweeps").glob("*/plan.jsonl"))


def at_work(store: Path) -> frozenset[str]:
    """Ids of the artifacts and quality results that cells may be reading now."""
    root = store / "leases" / "cells"
    live = {f.name for f in root.glob("*") if leases.owner(f) is not None}
    if not live:
        return frozenset()
    used: set[str] = set()
    for plan in plans(store):
        cells = {each.cell_id: each for each in _whole(plan)}
        for cell_id in live & cells.keys():
            for each in (cells[cell_id], cells.get(str(cells[cell_id].baseline_cell_id))):
                if each is not None:
                    used |= {each.artifact_id, each.quality_id}
    return frozenset(used)


def _record(file: Path) -> dict[str, Any]:
    """What of a record matters here, also of one that another version wrote."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = all(isinstance(found[key], str) for key in ("status", "artifact_id"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Unknown(f"{file} cannot be read; {FSCK}")
    return dict(found)


def _compared_with(record: dict[str, Any]) -> Iterator[str]:
    """The artifact of the baseline that a record's quality was compared with."""
    place: Any = record
    for key in ("environment", "stages", "quality", "baseline"):
        place = place.get(key) if isinstance(place, dict) else None
    if isinstance(place, str):
        yield place


def _planned(plan: Path) -> Iterable[PlannedCell]:
    try:
        return [codec.loads(PlannedCell, line) for line in glance.plan_lines(plan)]
    except (OSError, UnicodeDecodeError, codec.InvalidValue):
        raise Unknown(f"{plan} cannot be read; {FSCK}") from None


def _whole(plan: Path) -> Iterable[PlannedCell]:
    """The cells of a plan that can be read."""
    try:
        return _planned(plan)
    except Unknown:
        return ()
