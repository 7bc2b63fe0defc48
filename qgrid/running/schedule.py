"""The order of work and who does what next.

An artifact comes before its cells, and is made ahead while fewer cells are ready than there are
slots: no slot waits for a build that could have begun, and the first results do not wait for the
last artifact.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qgrid.types import PlannedCell

AGAIN_SECONDS = 0.5  # until a unit that another process works on is looked at again


@dataclass(frozen=True)
class Build:
    """An artifact to make, by a cell that needs it."""

    planned: PlannedCell

    @property
    def artifact_id(self) -> str:
        """What will be made."""
        return self.planned.artifact_id


Unit = Build | PlannedCell


def needed(
    cells: Iterable[PlannedCell],
    baselines: Callable[[PlannedCell], PlannedCell | None],
    exists: Callable[[str], bool],
) -> list[Build]:
    """A build for each artifact that is missing, of the cells and of what they compare with."""
    builds: dict[str, Build] = {}
    for cell in cells:
        for each in filter(None, (baselines(cell), cell)):
            if each.artifact_id not in builds and not exists(each.artifact_id):
                builds[each.artifact_id] = Build(each)
    return list(builds.values())


def ordered(
    cells: Sequence[PlannedCell], seconds: Callable[[PlannedCell], float | None]
) -> list[PlannedCell]:
    """Baselines first, cells of one artifact together, and among equals the longest first.

    A cell of unknown length counts as the longest; with nothing known the order stays.
    """

    def length(cell: PlannedCell) -> float:
        known = seconds(cell)
        return float("inf") if known is None else known

    longest: dict[str, float] = {}
    for cell in cells:
        longest[cell.artifact_id] = max(longest.get(cell.artifact_id, 0.0), length(cell))
    first = {name: number for number, name in enumerate(longest)}

    def place(cell: PlannedCell) -> tuple[bool, float, int, float]:
        group = cell.artifact_id
        return cell.baseline_cell_id is not None, -longest[group], first[group], -length(cell)

    return sorted(cells, key=place)


class Queue:
    """Hands units to the threads of slots; a cell waits for its artifacts."""

    def __init__(
        self,
        builds: Sequence[Build],
        cells: Sequence[PlannedCell],
        baselines: Callable[[PlannedCell], PlannedCell | None],
        stop: Callable[[], object],
        slots: int = 1,
    ) -> None:
        self._builds = list(builds)
        self._cells = list(cells)
        self._slots = slots
        self._open = {build.artifact_id for build in builds}  # not made yet
        self._baselines = baselines
        self._later: dict[int, float] = {}  # id of a unit -> when to look again
        self._stop = stop
        self._changed = threading.Condition()

    def take(self) -> Unit | None:
        """The next unit, waiting for one that is not ready yet; None: nothing is left.

        Raises:
            Stopped: the sweep was told to end.
        """
        with self._changed:
            while self._builds or self._cells:
                self._stop()
                unit = self._next()
                if unit is not None:
                    return unit
                self._changed.wait(0.1)
            return None

    def _next(self) -> Unit | None:
        """What to do now, taken out; None: there is nothing yet."""
        now = time.monotonic()
        builds = [each for each in self._builds if self._later.get(id(each), 0.0) <= now]
        ready = (each for each in self._cells if self._is_ready(each, now))
        cells = list(itertools.islice(ready, self._slots))
        if builds and len(cells) < self._slots:
            self._builds.remove(builds[0])
            return builds[0]
        if cells:
            self._cells.remove(cells[0])
            return cells[0]
        return None

    def done(self, unit: Unit) -> None:
        """A unit has come to its end, good or bad."""
        with self._changed:
            if isinstance(unit, Build):
                self._open.discard(unit.artifact_id)
            self._changed.notify_all()

    def defer(self, unit: Unit) -> None:
        """Another process works on it: come back to it after others."""
        with self._changed:
            if isinstance(unit, Build):
                self._builds.append(unit)
            else:
                self._cells.append(unit)
            self._later[id(unit)] = time.monotonic() + AGAIN_SECONDS
            self._changed.notify_all()

    def _is_ready(self, cell: PlannedCell, now: float) -> bool:
        if self._later.get(id(cell), 0.0) > now:
            return False
        if not self._open:
            return True
        base = self._baselines(cell)
        wanted = {cell.artifact_id} if base is None else {cell.artifact_id, base.artifact_id}
        return not wanted & self._open
