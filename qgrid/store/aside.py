"""Moving what is broken out of the way: nothing is deleted that somebody might want to look at."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from qgrid.store import records
from qgrid.types import PlannedCell, Record

FOLDER = "set_aside"


def set_aside(store: Path, path: Path) -> Path:
    """Move a file or a folder of the store into `set_aside/`, in one step; where it lies now.

    Its place in the store is free again, so that what it held is made or measured anew.

    Raises:
        OSError: it is gone, or the store cannot be written to.
    """
    room = store / FOLDER
    room.mkdir(exist_ok=True)
    name = ".".join(path.relative_to(store).parts)
    target = room / f"{name}.{uuid.uuid4().hex[:8]}"
    path.rename(target)
    return target


def readable(
    store: Path, planned: Iterable[PlannedCell], tell: Callable[[str], None]
) -> dict[str, Record]:
    """The records that there are, by cell id; a damaged one is set aside, to be measured again.

    Raises:
        records.UnreadableRecord: a record of another version.
    """
    known = {}
    for each in planned:
        try:
            record = records.read(store, each.cell_id)
        except records.DamagedRecord as error:
            there = set_aside(store, records.path(store, each.cell_id))
            tell(f"{error.what}: set aside as {there}, and measured again")
            continue
        if record is not None:
            known[each.cell_id] = record
    return known
