"""The stages of one cell: artifact, quality, speed; each done only where its result is missing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import codec, files, redact, registry
from qgrid.running import endings, machine, preload
from qgrid.running.launch import Launch, Outcome
from qgrid.running.processes import UnknownInterpreter, Worker, WorkerLost
from qgrid.running.slots import Slot
from qgrid.running.worker import FINGERPRINT
from qgrid.store import leases, records
from qgrid.store.leases import LAUNCH, Lease
from qgrid.types import (
    FAILURES,
    Check,
    Failure,
    Job,
    PlannedCell,
    Stage,
    StageResult,
)
from qgrid.weights import artifacts


class Pipeline:
    """Runs the stages of cells in one slot; each artifact and each quality once a launch."""

    def __init__(self, launch: Launch, slot: Slot, ahead: Sequence[str]) -> None:
        self._launch = launch
        self._slot = slot
        self._ahead = ahead
        self._store = launch.store
        self._settings = launch.settings
        self._log = launch.folder / "worker.log"
        self._workers: dict[str, Worker] = {}

    def run(self, planned: PlannedCell, stale: bool = False, keep: bool = False) -> Outcome:
        """All stages of a cell. `stale`: quality of another environment is measured again.

        `keep`: a timing that is there stays, for another part was missing.

        Raises:
            Stopped: the sweep was told to end.
        """
        outcome = Outcome()
        made, outcome.checks = self._artifact(planned, outcome)
        outcome.results["artifact"] = made
        if made.failure is not None:
            return outcome
        outcome.manifest = artifacts.load_manifest(self._folder(planned))
        baseline = self._baseline(planned, outcome)
        if baseline is not None:
            if baseline.quality_id not in self._launch.scored:
                with outcome.timed("waited"):  # slices are compared with its items
                    self._quality(baseline, None, False, Outcome())
            _await(self._launch.scored[baseline.quality_id], outcome)
        outcome.results["quality"] = self._quality(planned, baseline, stale, outcome)
        out = self._store / "cells" / planned.cell_id / "speed"
        timed = records.load_result(out / "result.json") if keep else None
        if timed is None or timed.failure is not None:
            timed = self._stage("speed", planned, out, baseline, outcome)
        outcome.results["speed"] = timed
        return outcome

    def build(self, planned: PlannedCell, lease: Lease) -> None:
        """Make the artifact of a cell unless it is there; its lease is held.

        Raises:
            Stopped: the sweep was told to end.
            Lost: another process has taken the lease over.
        """
        self._launch.made[planned.artifact_id] = self._made(planned, lease, Outcome())

    def close(self) -> None:
        """End all workers and whatever they run."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        redact.file(self._log)

    def _folder(self, planned: PlannedCell) -> Path:
        return artifacts.folder_of(self._store, planned.artifact_id)

    def _lease(self, planned: PlannedCell) -> Path:
        return leases.of(self._store, "artifacts", planned.artifact_id)

    def _artifact(
        self, planned: PlannedCell, outcome: Outcome
    ) -> tuple[StageResult, tuple[Check, ...]]:
        """Build the artifact where it is missing; verify it before this use."""
        known = self._launch.made.get(planned.artifact_id)
        if known is None:
            with leases.held(self._lease(planned), self._launch.stop.check) as lease:
                known = self._made(planned, lease, outcome)
            self._launch.made[planned.artifact_id] = known
        if known.failure is not None:
            return known, known.checks
        checks = self._verified(planned, outcome)
        bad = [check for check in checks if check.fatal and not check.ok]
        if not bad:
            return known, checks
        faults = "; ".join(f"{c.name}: expected {c.expected}, found {c.actual}" for c in bad)
        message = f"the stored artifact fails {faults}; `fresh=true` builds it again"
        return StageResult("artifact", failure=Failure("bad_artifact", message)), checks

    def _verified(self, planned: PlannedCell, outcome: Outcome) -> tuple[Check, ...]:
        """Check the artifact, while no timing runs beside it: it may read and hash all of it."""
        stop = self._launch.stop.check
        with contextlib.ExitStack() as held:
            if not _computes_elsewhere("quality", planned):
                with outcome.timed("waited"):
                    held.enter_context(self._machine("quality", planned))
            with outcome.timed("verify"):
                return artifacts.verify(
                    self._folder(planned),
                    planned,
                    files.HashCache(self._store / "hashes.json", stop),
                    full=self._settings.verify == "full",
                )

    def _made(self, planned: PlannedCell, lease: Lease, outcome: Outcome) -> StageResult:
        """The artifact's build, done now or before; its lease is held."""
        known = self._launch.made.get(planned.artifact_id)
        if known is not None:
            return known
        out = self._store / "builds" / planned.artifact_id
        earlier = records.load_result(out / "result.json")
        has_failed = earlier is not None and earlier.failure is not None
        if self._launch.has_artifact(planned.artifact_id):
            return self._found(planned) if earlier is None or has_failed else earlier
        if earlier is not None and has_failed and self._launch.ended(earlier):
            return earlier
        _remove_remains(self._folder(planned))  # of a build that was killed
        try:
            return self._stage("artifact", planned, out, None, outcome)
        finally:
            lease.check()
            _remove_remains(self._folder(planned))

    def _found(self, planned: PlannedCell) -> StageResult:
        """The build of an artifact of which no result tells, from its manifest.

        Nothing is written: a failure of a later build, for `fresh`, is another command's to read.
        """
        try:
            found = artifacts.reused(self._folder(planned))
        except (OSError, codec.InvalidValue):  # verifying it tells
            return StageResult("artifact")
        return replace(found, environment=self._circumstances(None))

    def _baseline(self, planned: PlannedCell, outcome: Outcome) -> PlannedCell | None:
        """The 16-bit cell to compare with, its artifact built and verified; None: there is none."""
        if planned.baseline_cell_id is None:
            return None
        baseline = self._launch.baseline(planned)
        if baseline is None or baseline.status is not None:
            reason = "it is not in this plan" if baseline is None else str(baseline.reason)
            outcome.notes.append(f"not compared with its baseline: {reason}")
            return None
        made = self._artifact(baseline, outcome)[0]
        failure = made.failure
        if failure is not None:
            _await(made, outcome)
            outcome.notes.append(f"not compared with its baseline: {failure.message}")
            return None
        outcome.baseline = baseline
        return baseline

    def _quality(
        self, planned: PlannedCell, baseline: PlannedCell | None, stale: bool, outcome: Outcome
    ) -> StageResult:
        """The quality of this id, measured unless it is on disk and complete."""
        known = self._launch.scored.get(planned.quality_id)
        if known is not None and self._usable(known, baseline, stale):
            return known
        out = self._store / "quality" / planned.quality_id
        lease = leases.of(self._store, "quality", planned.quality_id)
        with leases.held(lease, self._launch.stop.check):
            stored = records.load_result(out / "result.json")
            if stored is None or not self._usable(stored, baseline, stale):
                stored = self._stage("quality", planned, out, baseline, outcome)
        self._launch.scored[planned.quality_id] = stored
        return stored

    def _usable(self, stored: StageResult, baseline: PlannedCell | None, stale: bool) -> bool:
        """Whether a stored quality is complete: compared with this baseline, if there is one.

        What ended in this launch is not tried again, however it ended.
        """
        compared = baseline is None or stored.environment.get("baseline") == baseline.artifact_id
        if self._launch.ended(stored):
            return compared
        if stored.failure is not None or not self._launch.is_fresh(stored):
            return False
        current = stored.environment.get("fingerprint") == self._launch.fingerprint
        return compared and (current or not stale)

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
            cores=self._cores(stage, planned),
            anew=stage == "artifact" and self._settings.fresh,
        )
        # as it is: the stage must find the paths, and `config` lets no secret into a cell
        files.write_atomic(out / "job.json", codec.dumps(job, indent=1) + "\n", durable=False)
        self._launch.announce(planned, stage)
        limit: float = getattr(self._settings.limits, stage)
        with contextlib.ExitStack() as held:
            held.callback(redact.file, out / "log.txt")  # also when interrupted
            if not _computes_elsewhere(stage, planned):
                with outcome.timed("waited"):
                    held.enter_context(self._machine(stage, planned))
            try:
                ended = self._worker(stage, planned).run(out / "job.json", limit)
            except (WorkerLost, UnknownInterpreter) as error:
                return self._told(endings.lost(stage, str(error)), baseline, out)
        result = endings.result(stage, ended, out, limit)
        return result if result.environment else self._told(result, baseline, out)

    def _told(self, result: StageResult, baseline: PlannedCell | None, out: Path) -> StageResult:
        """An end of which the stage itself left no word, written down for who else needs it."""
        told = replace(result, environment=self._circumstances(baseline))
        records.save_result(out / "result.json", told)
        return told

    def _circumstances(self, baseline: PlannedCell | None) -> dict[str, Any]:
        return {
            "fingerprint": self._launch.fingerprint,
            "launch": self._launch.id,
            "baseline": None if baseline is None else baseline.artifact_id,
        }

    def _machine(self, stage: Stage, planned: PlannedCell) -> AbstractContextManager[None]:
        """Hold what the stage computes with: a timing alone, the other stages together."""
        cards = () if planned.cell.gpu.kind == "cpu" else self._slot.cards
        cores = self._cores(stage, planned)
        return machine.hold(cores, stage == "speed", cards, self._launch.stop.check)

    def _cores(self, stage: Stage, planned: PlannedCell) -> tuple[int, ...] | None:
        """The cores that a stage computes with: the slot's own.

        A timing on a CPU is one of the memory that all cores share, so it takes all of them: to
        be alone, and to run as it does where there is one slot.
        """
        if stage == "speed" and planned.cell.gpu.kind == "cpu":
            return None
        return self._slot.cores

    def _worker(self, stage: Stage, planned: PlannedCell) -> Worker:
        """The warm parent of the environment that the stage's method or runtime names."""
        if stage == "artifact":
            environment = registry.support(planned.cell.method).environment
        else:
            environment = registry.runtime(planned.cell.runtime.name).LOADS.environment
        if environment not in self._workers:
            told = {FINGERPRINT: self._launch.fingerprint, LAUNCH: self._launch.id}
            if self._slot.cores is not None and self._slot.cards:
                told["CUDA_VISIBLE_DEVICES"] = ",".join(self._slot.cards)
            worker = Worker(environment, self._log, told, self._ahead, self._launch.stop)
            self._workers[environment] = worker
        return self._workers[environment]


def _await(baseline: StageResult, outcome: Outcome) -> None:
    """Note that a cell could not be compared, where another launch tries its baseline again."""
    if baseline.failure is not None and baseline.failure.status in FAILURES:
        outcome.uncompared = baseline.failure.message


def _computes_elsewhere(stage: Stage, planned: PlannedCell) -> bool:
    """Whether a stage only asks a server: it need not wait for this machine, nor others for it."""
    return stage == "quality" and registry.runtime(planned.cell.runtime.name).LOADS.remote


def _remove_remains(artifact: Path) -> None:
    """Remove the folders that builds keep beside the artifact, once the one there was is back."""
    files.put_back(artifact)
    for aside in artifact.parent.glob(f".{artifact.name}.*"):
        shutil.rmtree(aside, ignore_errors=True)


def distributions(planned: Sequence[PlannedCell]) -> list[str]:
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
