"""Cell by cell: skip what is done, refuse what cannot run here, run the rest, write each record."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from qgrid import assembly, device, environment, records, redact, registry, timing
from qgrid.pipeline import Pipeline
from qgrid.progress import Progress
from qgrid.types import FAILURES, FINAL, Cell, Gpu, PlannedCell, Record, Settings, Tracking

if TYPE_CHECKING:
    from qgrid import tracking

INTERRUPTED, UNREADABLE = 130, 2  # exit codes
UNRUN = ("unsupported", "does_not_fit", "wrong_device")  # statuses of cells that never ran
MEASURED = ("ok", "oom")  # what was found out stays, also when a plan refuses the cell by now
Decision = Literal["run", "rerun_stale", "done", "stale", "refuse", "wrong_device"]
REMARKS: dict[Decision, str] = {
    "done": "(done before)",
    "stale": "(stale: measured in another environment)",
}


class Interrupted(KeyboardInterrupt):
    """The user or the system asked the sweep to end."""


def run(planned: Sequence[PlannedCell], settings: Settings, folder: Path) -> int:
    """Run the cells of a plan in order; `folder` is the sweep's, under the root of all outputs.

    Returns:
        0; 1 when a cell ended in a failure or none is ok; 2 when a record of the plan cannot be
        read; 130 when interrupted.
    """
    sweep = Sweep(planned, settings, folder)
    try:
        with _signals(_interrupt):
            sweep.run()
    except records.UnreadableRecord as error:
        sweep.progress.line(str(error))
        return UNREADABLE
    except Interrupted:
        sweep.progress.line("interrupted; the same command goes on where this one stopped")
        return INTERRUPTED
    return sweep.verdict()


class Sweep:
    """One run over a plan. `records` holds what each cell came to, old or new, by cell id."""

    def __init__(
        self,
        planned: Sequence[PlannedCell],
        settings: Settings,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        self.planned = planned
        self.records: dict[str, Record] = {}
        self.progress = Progress(planned) if progress is None else progress
        self._settings = settings
        self._folder = folder
        self._store = folder.parents[1]
        self._found = device.describe()
        self._environment = environment.provenance()

    def run(self) -> None:
        """All cells; on the way out nothing of them is left running."""
        known = records.read_all(self._store, self.planned)
        decisions = {each.cell_id: self.decide(each, known) for each in self.planned}
        self._announce(decisions)
        with self._closing() as (pipeline, mirror):
            if set(decisions.values()) - {"done", "stale"}:
                mirror.start()  # it is ready when the first cell is done
            for each in self.planned:
                decision = decisions[each.cell_id]
                if decision in {"done", "stale"}:
                    self.records[each.cell_id] = known[each.cell_id]
                    self.progress.end(each, known[each.cell_id], False, REMARKS[decision])
                    continue
                record = self._record(each, decision, pipeline)
                self.records[each.cell_id] = record
                records.write(self._store, record)
                self.progress.end(each, record, ran=decision in {"run", "rerun_stale"})
                mirror.log(record)

    def decide(self, planned: PlannedCell, known: dict[str, Record]) -> Decision:
        """What to do about a cell, given its record."""
        record = known.get(planned.cell_id)
        if planned.status is not None:
            stays = record is not None and (record.status in MEASURED or _says(record, planned))
            return "done" if stays else "refuse"
        if not _may_run_here(planned.cell, self._found):
            # what the right device has found out stays
            return "wrong_device" if record is None or record.status in UNRUN else "done"
        if record is None or self._settings.fresh or self._is_wanted_again(record):
            return "run"
        if record.environment.get("fingerprint") == self._environment["fingerprint"]:
            return "done"
        return "rerun_stale" if "stale" in self._settings.rerun else "stale"

    def _is_wanted_again(self, record: Record) -> bool:
        """Whether a record is no final word, or of a kind that `rerun` names."""
        if record.status not in FINAL or record.status in {*UNRUN, *self._settings.rerun}:
            return True
        return "unstable" in self._settings.rerun and timing.is_unstable(*record.measurements)

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

    def _announce(self, decisions: Mapping[str, Decision]) -> None:
        """One line: how many cells there are and what will be done about them."""
        counts = Counter(decisions.values())
        self.progress.open(counts["run"] + counts["rerun_stale"])
        words: dict[Decision, str] = {
            "run": "to run",
            "rerun_stale": "stale, to run again",
            "done": "done before",
            "stale": "stale (measured in another environment; `rerun=stale` repeats them)",
            "refuse": "refused",
            "wrong_device": "for another device",
        }
        parts = [f"{counts[key]} {text}" for key, text in words.items() if counts[key]]
        self.progress.line(f"{len(decisions)} cells: {', '.join(parts)}")

    def _record(self, planned: PlannedCell, decision: Decision, pipeline: Pipeline) -> Record:
        now = {**self._environment, **environment.momentary()}
        if decision == "refuse":
            assert planned.status is not None
            return assembly.refused(planned, planned.status, planned.reason or "", now)
        if decision == "wrong_device":
            reason = f"planned for `{planned.cell.gpu.name}`; this machine has `{self._found.name}`"
            return assembly.refused(planned, "wrong_device", reason, now)
        self.progress.begin(planned)
        begin = time.monotonic()
        try:
            outcome = pipeline.run(planned, stale=decision == "rerun_stale")
            record = assembly.measured(planned, outcome, self._store, self._found, now)
        except Exception as error:  # noqa: BLE001 - one cell's end is not the grid's
            return assembly.broken(planned, error, now)
        wall = time.monotonic() - begin
        return replace(record, timings={**record.timings, "wall_seconds": wall})

    @contextlib.contextmanager
    def _closing(self) -> Iterator[tuple[Pipeline, _Mirror]]:
        """The pipeline and the mirror of this run, both ended whatever happens."""
        fingerprint = str(self._environment["fingerprint"])
        stage = self.progress.stage
        pipeline = Pipeline(self.planned, self._settings, self._folder, fingerprint, stage)
        mirror = _Mirror(self._settings.tracking, self._folder, self.progress)
        try:
            yield pipeline, mirror
        finally:
            with _signals(signal.SIG_IGN):  # a second Ctrl-C must not cut this short
                pipeline.close()
                self.progress.close()
                mirror.close()


class _Mirror:
    """The tracking mirror; its failures cost one line, never a result."""

    def __init__(self, wanted: Tracking, folder: Path, progress: Progress) -> None:
        self._wanted = wanted
        self._folder = folder
        self._progress = progress
        self._mirror: tracking.Mirror | None = None

    def start(self) -> None:
        with self._spared():
            from qgrid import tracking

            store = self._folder.parents[1]
            self._mirror = tracking.start(self._wanted, self._folder.name, store)

    def log(self, record: Record) -> None:
        if self._mirror is not None:
            with self._spared():
                self._mirror.log(record)

    def close(self) -> None:
        if self._mirror is not None:
            with self._spared():
                self._mirror.close()

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        """Let no fault of the mirror out of the block."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a mirror never costs a result
            self._mirror = None
            reason = redact.text(f"{type(error).__name__}: {error}")
            self._progress.line(f"tracking is off for the rest of this run: {reason}")


def _may_run_here(cell: Cell, found: Gpu) -> bool:
    """Whether this machine is the planned one, or has nothing to do with it."""
    remote = registry.runtime(cell.runtime.name).LOADS.remote
    return remote or device.matches(cell.gpu, found)


def _says(record: Record, planned: PlannedCell) -> bool:
    """Whether a record is the refusal that the plan states."""
    reason = None if record.error is None else record.error.message
    return record.status == planned.status and reason == planned.reason


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> Iterator[None]:
    """Answer Ctrl-C and its kin by `handler` inside the block (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)
