"""One launch of a sweep: what its pipelines share, and what each cell comes to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from qgrid.files import write_atomic
from qgrid.running.stopping import Stop
from qgrid.store import leases, records
from qgrid.types import Check, Manifest, PlannedCell, Settings, Stage, StageResult
from qgrid.weights import artifacts

LAUNCHES = "launches"  # in the sweep's folder: a folder for each
EARLIER = "earlier.txt"  # beside it: launches that came before the plan


def new_id() -> str:
    """The name of a launch."""
    return uuid4().hex[:12]


def since(folder: Path) -> frozenset[str]:
    """The launches of a sweep since it was planned last: `fresh` and `rerun` count from there.

    What one of them has measured is not measured again when the next one goes on.
    """
    try:
        earlier = (folder / EARLIER).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        earlier = []
    return frozenset(_launches(folder)) - frozenset(earlier)


def planned_anew(folder: Path) -> None:
    """Write down which launches belong to an earlier plan or command: not those that still run."""
    here = {each for each, owner in owners(folder).items() if owner.is_here}
    over = sorted(set(_launches(folder)) - here)
    write_atomic(folder / EARLIER, "".join(f"{each}\n" for each in over))


def is_running(folder: Path) -> bool:
    """Whether a launch of a sweep is known to run on this machine."""
    return any(owner.is_here for owner in owners(folder).values())


def owners(folder: Path) -> dict[str, leases.Owner]:
    """The launches of a sweep that run on machines, and their processes, as far as is known.

    One on another machine may have died without a word.
    """
    store = folder.parents[1]
    found = {
        each: leases.owner(leases.of(store, "launches", each)) for each in sorted(_launches(folder))
    }
    return {each: owner for each, owner in found.items() if owner is not None}


def _launches(folder: Path) -> list[str]:
    try:
        return [each.name for each in (folder / LAUNCHES).iterdir()]
    except FileNotFoundError:
        return []


@dataclass
class Outcome:
    """What the stages of one cell gave; `seconds` is the controller's time by purpose."""

    results: dict[Stage, StageResult] = field(default_factory=dict)
    ran: set[Stage] = field(default_factory=set)  # in this run; the others were on disk
    baseline: PlannedCell | None = None  # what quality was compared with
    manifest: Manifest | None = None
    checks: tuple[Check, ...] = ()  # of the artifact, before this use
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    uncompared: str | None = None  # why the baseline is not there yet: a later launch compares

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's wall time to `name`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin


@dataclass(frozen=True)
class Launch:
    """What the pipelines of one sweep share: its cells, and what each came to so far."""

    cells: Mapping[str, PlannedCell]  # by cell id; also those that only others compare with
    settings: Settings
    folder: Path  # of the sweep
    fingerprint: str  # of this machine's environment
    id: str
    since: frozenset[str]  # launches of this command: what they have made is not made again
    announce: Callable[[PlannedCell, Stage], None]
    stop: Stop = field(default_factory=Stop)
    made: dict[str, StageResult] = field(default_factory=dict)  # by artifact id
    scored: dict[str, StageResult] = field(default_factory=dict)  # by quality id

    @property
    def store(self) -> Path:
        """The root of all outputs."""
        return self.folder.parents[1]

    def baseline(self, planned: PlannedCell) -> PlannedCell | None:
        """The 16-bit cell that another compares with, of this plan or as its record tells it."""
        if planned.baseline_cell_id is None:
            return None
        found = self.cells.get(planned.baseline_cell_id)
        if found is not None:
            return found
        try:
            record = records.read(self.store, planned.baseline_cell_id)
        except records.UnreadableRecord:
            return None
        if record is None:
            return None
        ids = (record.cell_id, record.artifact_id, record.quality_id, record.baseline_cell_id)
        return PlannedCell(*ids, cell=record.cell, added=True)

    def has_artifact(self, artifact_id: str) -> bool:
        """Whether an artifact is there that counts: with `fresh`, one made for this command."""
        if not artifacts.exists(self.store, artifact_id):
            return False
        if not self.settings.fresh:
            return True
        made = records.load_result(self.store / "builds" / artifact_id / "result.json")
        return made is not None and made.failure is None and self.is_fresh(made)

    def is_fresh(self, result: StageResult | None) -> bool:
        """Whether a stage was done for this command, where `fresh` asks for all of them anew."""
        if not self.settings.fresh:
            return True
        made_in = None if result is None else result.environment.get("launch")
        # one that joined later is not known from the beginning
        return made_in is not None and (made_in in self.since or made_in in since(self.folder))

    def ended(self, result: StageResult | None) -> bool:
        """Whether a stage ended in this launch, in this process or in another."""
        return result is not None and result.environment.get("launch") == self.id
