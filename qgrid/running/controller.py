"""Cell by cell: skip what is done, refuse what cannot run here, run the rest, write each record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qgrid import commands, device, environment
from qgrid.mirroring.spared import Mirror
from qgrid.running import (
    assembly,
    attempts,
    builds,
    crew,
    decisions,
    launch,
    pipeline,
    schedule,
    stopping,
)
from qgrid.running.decisions import Decision
from qgrid.running.pipeline import Pipeline
from qgrid.running.progress import Progress
from qgrid.running.slots import Slot
from qgrid.running.stopping import Interrupted
from qgrid.store import leases, place, records
from qgrid.store.aside import readable
from qgrid.types import (
    FAILURES,
    PlannedCell,
    Record,
    Settings,
)

INTERRUPTED, UNREADABLE, STORE_FAILED = 130, 2, 3  # ends of a launch


@dataclass(frozen=True)
class Part:
    """The part of a launch that one machine does; by default all of it, in its own launch."""

    launch: str = field(default_factory=launch.new_id)
    slots: tuple[Slot, ...] = (Slot(),)
    builds: tuple[PlannedCell, ...] = ()  # whose artifacts to make, beside those of the cells
    others: tuple[PlannedCell, ...] = ()  # that the cells compare with
    attempts: int | None = None  # of one cell, before it is given up; None: no limit


def run(
    planned: Sequence[PlannedCell], settings: Settings, folder: Path, part: Part | None = None
) -> int:
    """Run the cells of a plan; `folder` is the sweep's, under the root of all outputs.

    Returns:
        0; 1 when a cell ended in a failure or none is ok; `UNREADABLE` when a record of the plan
        cannot be read, `STORE_FAILED` when the store cannot be written to, `INTERRUPTED`.
    """
    sweep = Sweep(planned, settings, folder, part=part)
    code = bring(sweep)
    return sweep.verdict() if code is None else code


def bring(sweep: Sweep) -> int | None:
    """Run a sweep; None when every cell has its record, else why not, as `run` returns it."""
    try:
        with stopping.on_signal(stopping.interrupt):
            sweep.run()
    except records.UnreadableRecord as error:
        sweep.progress.line(str(error))
        return UNREADABLE
    except Interrupted:
        resume = commands.command("resume", sweep.folder)
        sweep.progress.line(f"interrupted; the same command goes on, as does `{resume}`")
        return INTERRUPTED
    except OSError as error:
        if not place.is_unwritable(error):
            raise
        sweep.progress.line(place.sentence(error))
        return STORE_FAILED
    return None


class Sweep:
    """One run over a plan. `records` holds what each cell came to, old or new, by cell id."""

    def __init__(
        self,
        planned: Sequence[PlannedCell],
        settings: Settings,
        folder: Path,
        progress: Progress | None = None,
        part: Part | None = None,
    ) -> None:
        self.planned = planned
        self.records: dict[str, Record] = {}
        self.progress = Progress(planned) if progress is None else progress
        self._settings = settings
        self.folder = folder
        self.store = folder.parents[1]
        self._found = device.describe()
        self._environment = environment.provenance()
        self._part = Part() if part is None else part
        fingerprint = str(self._environment["fingerprint"])
        since = launch.since(folder) | {self._part.launch}
        self._rule = decisions.Rule(settings, self._found, fingerprint, self._part.launch, since)
        self._known: dict[str, Record] = {}
        self._decisions: dict[str, Decision] = {}
        self._attempts = attempts.Attempts(self._part.launch, self._part.attempts)
        self._mirror = Mirror(settings.tracking, folder, self.progress)
        self._launch = launch.Launch(
            cells={each.cell_id: each for each in (*self._part.others, *planned)},
            settings=settings,
            folder=folder,
            fingerprint=fingerprint,
            id=self._part.launch,
            since=since,
            announce=self.progress.stage,
        )

    def run(self) -> None:
        """All cells; on the way out nothing of them is left running.

        Raises:
            UnreadableRecord: a record of another version.
            Interrupted: a signal.
            OSError: the store cannot be written to.
        """
        self._known = readable(self.store, self.planned, self.progress.line)
        for each in self.planned:
            self._decisions[each.cell_id] = self._decide(each)
        self._announce()
        try:
            if set(self._decisions.values()) - {"done", "stale"} or self._part.builds:
                self._mirror.start()
            to_run = []
            for each in self.planned:
                if self._decisions[each.cell_id] in decisions.TO_RUN:
                    to_run.append(each)
                else:
                    self._settle(each)
            self._work(to_run)
        finally:
            with stopping.undisturbed():
                self.progress.close()
                self._mirror.close()

    def _decide(self, planned: PlannedCell) -> Decision:
        record = self._known.get(planned.cell_id)
        decided = self._rule.decide(planned, record)
        result = self.store / "quality" / planned.quality_id / "result.json"
        is_measured = record is not None and record.status == "ok"
        if decided == "done" and is_measured and planned.status is None and not result.exists():
            here = decisions.may_run_here(planned.cell, self._found)
            return "complete" if here else decided  # `fsck` has set it aside
        return decided

    def _settle(self, planned: PlannedCell) -> None:
        """Bring a cell that does not run to its end: its old record stays, or says why not."""
        decision, record = self._decisions[planned.cell_id], self._known.get(planned.cell_id)
        remark = decisions.REMARKS.get(decision, "")
        if record is None or decision in decisions.REFUSALS:
            record, remark = self._refuse(planned)
        self.records[planned.cell_id] = record
        self.progress.end(planned, record, False, remark)

    def _refuse(self, planned: PlannedCell) -> tuple[Record, str]:
        """Write down why a cell does not run here, unless another machine runs it, or has."""
        refused = self._refused(planned)
        lease = leases.attempt(leases.of(self.store, "cells", planned.cell_id))
        if lease is None:
            return refused, "(at work in another launcher)"
        try:
            found = self._by_another(planned)
            if found and self._rule.decide(planned, found) not in decisions.REFUSALS:
                return found, "(done by another launcher)"
            records.write(self.store, refused)
        finally:
            lease.release()
        self._mirror.log(refused)
        return refused, ""

    def _work(self, to_run: Sequence[PlannedCell]) -> None:
        """Run cells in all slots, the artifacts that they lack before them."""
        baselines = {each.cell_id: self._launch.baseline(each) for each in to_run}
        missing = schedule.needed(
            [*self._part.builds, *to_run],
            lambda each: baselines.get(each.cell_id),
            self._launch.has_artifact,
        )
        if not to_run and not missing:
            return
        queue = schedule.Queue(
            missing,
            schedule.ordered(to_run, self._seconds()),
            lambda each: baselines[each.cell_id],
            self._launch.stop.check,
            len(self._part.slots),
        )
        ahead = pipeline.distributions(to_run)
        crew.work(
            self._part.slots,
            queue,
            lambda slot: Pipeline(self._launch, slot, ahead),
            self._perform,
            self._launch.stop,
        )

    def _seconds(self) -> Callable[[PlannedCell], float | None]:
        """How long cells take, as like ones did; one slot needs no such order."""
        if len(self._part.slots) == 1:
            return lambda _: None
        from qgrid.running.expected import Expected

        return Expected.load(self.store).measuring_seconds

    def _perform(self, unit: schedule.Unit, pipeline: Pipeline) -> bool:
        """Bring a unit to its end; False: another process is at it."""
        if isinstance(unit, schedule.Build):
            return self._build(unit.planned, pipeline)
        lease = leases.attempt(leases.of(self.store, "cells", unit.cell_id))
        if lease is None:
            return False
        try:
            record, remark = self._by_another(unit), "(done by another launcher)"
            if record is None:
                record, remark = self._record(unit, pipeline), ""
                lease.check()
                records.write(self.store, record)
        except leases.Lost:
            return False
        finally:
            lease.release()
        self.records[unit.cell_id] = record
        self.progress.end(unit, record, not remark, remark)
        if not remark:
            self._mirror.log(record)
        return True

    def _build(self, planned: PlannedCell, pipeline: Pipeline) -> bool:
        """Make an artifact; False: another process is at it."""
        if not decisions.may_run_here(planned.cell, self._found):
            return True  # its cells will say so
        return builds.make(planned, pipeline, self._launch, self._attempts)

    def _by_another(self, planned: PlannedCell) -> Record | None:
        """The record that another process has written since this one looked."""
        try:
            record = records.read(self.store, planned.cell_id)
        except records.DamagedRecord:
            return None
        return None if record == self._known.get(planned.cell_id) else record

    def verdict(self) -> int:
        """Print what failed and why; the exit code."""
        failed = [each for each in self.planned if self.records[each.cell_id].status in FAILURES]
        for each in failed:
            record = self.records[each.cell_id]
            message = "" if record.error is None else record.error.message
            self.progress.line(f"{record.status}: {self.progress.label(each)}: {message}")
        none_ok = not any(record.status == "ok" for record in self.records.values())
        if none_ok:
            self.progress.line("no cell is ok")
        return 1 if failed or none_ok else 0

    def _announce(self) -> None:
        """One line: how many cells there are and what will be done about them."""
        counts = Counter(self._decisions.values())
        self.progress.open(sum(counts[each] for each in decisions.TO_RUN))
        parts = [f"{counts[key]} {text}" for key, text in decisions.WORDS.items() if counts[key]]
        self.progress.line(f"{len(self.planned)} cells: {', '.join(parts)}")

    def _refused(self, planned: PlannedCell) -> Record:
        """The record of a cell that does not run here."""
        if planned.status is not None:
            return assembly.refused(planned, planned.status, planned.reason or "", self._now())
        apart = device.mismatch(planned.cell.gpu, self._found)
        here = f"this machine has `{self._found.name}` ({apart})"
        reason = f"planned for `{planned.cell.gpu.name}`; {here}"
        return assembly.refused(planned, "wrong_device", reason, self._now())

    def _record(self, planned: PlannedCell, pipeline: Pipeline) -> Record:
        """Run a cell: its record, whatever it comes to."""
        folder, now = records.path(self.store, planned.cell_id).parent, self._now()
        self.progress.begin(planned)
        given_up = self._attempts.given_up(folder)
        if given_up is not None:
            return assembly.refused(planned, given_up.status, given_up.message, now)
        begin = time.monotonic()
        decision = self._decisions[planned.cell_id]
        try:
            with self._attempts.counted(folder):
                outcome = pipeline.run(planned, decision == "rerun_stale", decision == "complete")
            record = assembly.measured(planned, outcome, self.store, self._found, now)
        except leases.Lost:
            raise  # its artifact is another process's by now, and so is the rest
        except Exception as error:
            if place.is_unwritable(error):
                raise
            return assembly.broken(planned, error, now)  # one cell's end is not the grid's
        wall = time.monotonic() - begin
        return replace(record, timings={**record.timings, "wall_seconds": wall})

    def _now(self) -> dict[str, Any]:
        launch = {"launch": self._part.launch}
        return {**self._environment, **environment.momentary(), **launch}
