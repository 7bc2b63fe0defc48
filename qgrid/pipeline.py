"""The stages of one cell: artifact, quality, speed; each done only where its result is missing."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qgrid import artifacts, codec, endings, files, preload, records, redact, registry
from qgrid.processes import UnknownInterpreter, Worker, WorkerLost
from qgrid.types import (
    Check,
    Failure,
    Job,
    Manifest,
    PlannedCell,
    Settings,
    Stage,
    StageResult,
)


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

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's wall time to `name`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin


class Pipeline:
    """Runs the stages of cells one after the other; each artifact and each quality once a sweep."""

    def __init__(
        self,
        planned: Sequence[PlannedCell],
        settings: Settings,
        folder: Path,
        fingerprint: str,
        announce: Callable[[Stage], None],
    ) -> None:
        self._cells = {each.cell_id: each for each in planned}
        self._settings = settings
        self._store = folder.parents[1]
        self._log = folder / "worker.log"
        self._fingerprint = fingerprint
        self._announce = announce
        self._ahead = _distributions(planned)
        self._workers: dict[str, Worker] = {}
        self._made: dict[str, StageResult] = {}  # by artifact id
        self._scored: dict[str, StageResult] = {}  # by quality id
        self._building: Path | None = None

    def run(self, planned: PlannedCell, stale: bool = False) -> Outcome:
        """All stages of a cell. `stale`: quality of another environment is measured again."""
        outcome = Outcome()
        made, outcome.checks = self._artifact(planned, outcome)
        outcome.results["artifact"] = made
        if made.failure is not None:
            return outcome
        outcome.manifest = artifacts.load_manifest(self._folder(planned))
        baseline = self._baseline(planned, outcome)
        outcome.results["quality"] = self._quality(planned, baseline, stale, outcome)
        out = self._store / "cells" / planned.cell_id / "speed"
        outcome.results["speed"] = self._stage("speed", planned, out, baseline, outcome)
        return outcome

    def close(self) -> None:
        """End all workers and whatever they run."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        redact.file(self._log)
        self._clear_building()

    def _clear_building(self) -> None:
        """Remove what a killed build left aside, unless another process is building there now."""
        folder, self._building = self._building, None
        if folder is None or not folder.parent.is_dir():
            return
        with _lock_of(folder).open("a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_remains(folder)

    def _folder(self, planned: PlannedCell) -> Path:
        return self._store / "artifacts" / planned.artifact_id

    def _artifact(
        self, planned: PlannedCell, outcome: Outcome
    ) -> tuple[StageResult, tuple[Check, ...]]:
        """Build the artifact where it is missing; verify it before this use."""
        known = self._made.get(planned.artifact_id)
        if known is None:
            known = self._made[planned.artifact_id] = self._build(planned, outcome)
        if known.failure is not None:
            return known, known.checks
        with outcome.timed("verify"):
            checks = artifacts.verify(
                self._folder(planned),
                planned,
                files.HashCache(self._store / "hashes.json"),
                full=self._settings.verify == "full",
            )
        bad = [check for check in checks if check.fatal and not check.ok]
        if not bad:
            return known, checks
        faults = "; ".join(f"{c.name}: expected {c.expected}, found {c.actual}" for c in bad)
        message = f"the stored artifact fails {faults}; `fresh=true` builds it again"
        return StageResult("artifact", failure=Failure("bad_artifact", message)), checks

    def _build(self, planned: PlannedCell, outcome: Outcome) -> StageResult:
        if self._settings.fresh:
            self._discard(planned)
        if artifacts.exists(self._store, planned.artifact_id):
            return StageResult("artifact")
        out = self._store / "cells" / planned.cell_id / "artifact"
        self._building = self._folder(planned)
        made = self._stage("artifact", planned, out, None, outcome)
        self._clear_building()
        return made

    def _discard(self, planned: PlannedCell) -> None:
        folder = self._folder(planned)
        with files.locked(_lock_of(folder)):
            with contextlib.suppress(FileNotFoundError):
                folder.rename(folder.with_name(f".{folder.name}.old"))
            _remove_remains(folder)

    def _baseline(self, planned: PlannedCell, outcome: Outcome) -> PlannedCell | None:
        """The 16-bit cell to compare with, its artifact built and verified; None: there is none."""
        if planned.baseline_cell_id is None:
            return None
        baseline = self._cells.get(planned.baseline_cell_id) or self._stored_baseline(planned)
        if baseline is None or baseline.status is not None:
            reason = "it is not in this plan" if baseline is None else str(baseline.reason)
            outcome.notes.append(f"not compared with its baseline: {reason}")
            return None
        failure = self._artifact(baseline, outcome)[0].failure
        if failure is not None:
            outcome.notes.append(f"not compared with its baseline: {failure.message}")
            return None
        outcome.baseline = baseline
        return baseline

    def _stored_baseline(self, planned: PlannedCell) -> PlannedCell | None:
        record = records.read(self._store, str(planned.baseline_cell_id))
        if record is None:
            return None
        ids = (record.cell_id, record.artifact_id, record.quality_id, record.baseline_cell_id)
        return PlannedCell(*ids, cell=record.cell, added=True)

    def _quality(
        self, planned: PlannedCell, baseline: PlannedCell | None, stale: bool, outcome: Outcome
    ) -> StageResult:
        """The quality of this id, measured unless it is on disk and complete."""
        known = self._scored.get(planned.quality_id)
        if known is not None:
            return known
        out = self._store / "quality" / planned.quality_id
        with files.locked(out.with_suffix(".lock")):
            stored = None if self._settings.fresh else records.load_result(out / "result.json")
            if stored is None or not self._usable(stored, baseline, stale):
                stored = self._stage("quality", planned, out, baseline, outcome)
        self._scored[planned.quality_id] = stored
        return stored

    def _usable(self, stored: StageResult, baseline: PlannedCell | None, stale: bool) -> bool:
        """Whether a stored quality is complete: compared with this baseline, if there is one."""
        compared = baseline is None or stored.environment.get("baseline") == baseline.artifact_id
        current = stored.environment.get("fingerprint") == self._fingerprint
        return stored.failure is None and compared and (current or not stale)

    def _stage(
        self,
        stage: Stage,
        planned: PlannedCell,
        out: Path,
        baseline: PlannedCell | None,
        outcome: Outcome,
    ) -> StageResult:
        """Run one stage in a process of its own, while no timing runs beside it."""
        outcome.ran.add(stage)
        (out / "result.json").unlink(missing_ok=True)
        job = Job(
            stage=stage,
            planned=planned,
            artifact=str(self._folder(planned)),
            baseline=None if baseline is None else str(self._folder(baseline)),
            out=str(out),
            store=str(self._store),
            verify=self._settings.verify,
        )
        # as it is: the stage must find the paths, and `config` lets no secret into a cell
        files.write_atomic(out / "job.json", codec.dumps(job, indent=1) + "\n", durable=False)
        self._announce(stage)
        limit: float = getattr(self._settings.limits, stage)
        with contextlib.ExitStack() as held:
            held.callback(redact.file, out / "log.txt")  # also when interrupted
            if not _computes_elsewhere(stage, planned):
                with outcome.timed("waited"):
                    held.enter_context(machine(alone=stage == "speed"))
            try:
                ended = self._worker(stage, planned).run(out / "job.json", limit)
            except (WorkerLost, UnknownInterpreter) as error:
                return endings.lost(stage, str(error))
        return endings.result(stage, ended, out, limit)

    def _worker(self, stage: Stage, planned: PlannedCell) -> Worker:
        """The warm parent of the environment that the stage's method or runtime names."""
        if stage == "artifact":
            environment = registry.support(planned.cell.method).environment
        else:
            environment = registry.runtime(planned.cell.runtime.name).LOADS.environment
        if environment not in self._workers:
            worker = Worker(environment, self._log, self._fingerprint, self._ahead)
            self._workers[environment] = worker
        return self._workers[environment]


def _computes_elsewhere(stage: Stage, planned: PlannedCell) -> bool:
    """Whether a stage only asks a server: it need not wait for this machine, nor others for it."""
    return stage == "quality" and registry.runtime(planned.cell.runtime.name).LOADS.remote


@contextlib.contextmanager
def machine(alone: bool) -> Iterator[None]:
    """Hold this machine: a timing stage alone, the other stages together.

    Who waits for the machine holds the turn, so that a timing is not overtaken for ever.
    """
    lock = files.machine_lock()
    with contextlib.ExitStack() as held:
        with files.locked(lock.with_name("turn.lock")):
            held.enter_context(files.locked(lock, shared=not alone))
        yield


def _lock_of(artifact: Path) -> Path:
    """The lock that a build of the artifact holds."""
    return artifact.with_name(f"{artifact.name}.lock")


def _remove_remains(artifact: Path) -> None:
    """Remove the folders that builds keep beside the artifact."""
    for aside in artifact.parent.glob(f".{artifact.name}.*"):
        shutil.rmtree(aside, ignore_errors=True)


def _distributions(planned: Sequence[PlannedCell]) -> list[str]:
    """What the methods and runtimes of a plan use and a warm parent can import ahead."""
    wanted: dict[str, None] = {}
    for each in planned:
        if each.status is None:
            packages = (
                *registry.runtime(each.cell.runtime.name).LOADS.packages,
                *registry.support(each.cell.method).packages,
            )
            wanted.update(dict.fromkeys(packages))
    return [name for name in wanted if name in preload.MODULES and name not in preload.BASE]
