"""From what the stages of a cell gave to its record. Reads item files; measures nothing."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qgrid import registry
from qgrid.running.decisions import UNCOMPARED
from qgrid.running.launch import Outcome
from qgrid.types import (
    FAILURES,
    RECORD_SCHEMA,
    Check,
    Failure,
    Gpu,
    Manifest,
    Measurement,
    PlannedCell,
    Record,
    StageResult,
    Status,
)
from qgrid.weights import artifacts


class DamagedItems(ValueError):
    """Results per item that cannot be read."""


def refused(
    planned: PlannedCell, status: Status, reason: str, environment: Mapping[str, Any]
) -> Record:
    """The record of a cell that was not run: its status, the reason and its planned figures."""
    return replace(_empty(planned, environment), status=status, error=Failure(status, reason))


def broken(planned: PlannedCell, error: Exception, environment: Mapping[str, Any]) -> Record:
    """The record of a cell that the controller itself could not bring to an end."""
    return replace(_empty(planned, environment), status="crashed", error=fault(error))


def fault(error: Exception) -> Failure:
    """A fault of the controller itself as the end of a stage or a cell."""
    trace = "".join(traceback.format_exception(error))
    return Failure("crashed", f"{type(error).__name__}: {error}", trace)


def measured(
    planned: PlannedCell,
    outcome: Outcome,
    store: Path,
    found: Gpu,
    environment: Mapping[str, Any],
) -> Record:
    """The record of a cell that ran, whatever it came to; a failed stage keeps what others gave."""
    with outcome.timed("compare"):
        changes, notes = _changes(planned, outcome, store)
    failures = [f for f in map(_failure, outcome.results.values()) if f is not None]
    failures.sort(key=lambda failure: failure.status not in FAILURES)  # oom is the lesser news
    others = [failure.message for failure in failures[1:]]
    return replace(
        _empty(planned, environment),
        status=failures[0].status if failures else "ok",
        artifact={} if outcome.manifest is None else artifact_summary(outcome.manifest),
        measurements=(*_stage_measurements(planned, outcome), *changes),
        checks=_checks(outcome),
        observed=_observed(planned, outcome, found),
        environment={**environment, "stages": _environments(outcome)},
        timings=_timings(outcome),
        notes=tuple(dict.fromkeys([*planned.notes, *outcome.notes, *notes, *others])),
        error=failures[0] if failures else None,
    )


def artifact_summary(manifest: Manifest) -> dict[str, Any]:
    """What a record says of the files that were loaded; layers are counted, not listed."""
    modules: dict[str, int] = {}
    for state in manifest.modules.values():
        kind = f"{state.method} {state.format} {state.bits:g}"
        modules[kind] = modules.get(kind, 0) + 1
    whole = asdict(replace(manifest, modules={}))
    dropped = {"artifact_id", "model", "method", "checks", "modules"}
    kept = {name: value for name, value in whole.items() if name not in dropped}
    size = None if manifest.bits_per_weight is None else sum(manifest.sizes.values())
    return kept | {"modules": modules, "size_bytes": size}


def own_seconds(result: StageResult) -> float:
    """Time that a stage spent on its own work: the sum of its phases, of which `build` is all."""
    return result.seconds.get("build", sum(result.seconds.values()))


def _empty(planned: PlannedCell, environment: Mapping[str, Any]) -> Record:
    return Record(
        schema=RECORD_SCHEMA,
        cell_id=planned.cell_id,
        artifact_id=planned.artifact_id,
        quality_id=planned.quality_id,
        baseline_cell_id=planned.baseline_cell_id,
        status="ok",
        cell=planned.cell,
        artifact={},
        measurements=(),
        checks=(),
        observed={},
        environment=environment,
        timings={},
        notes=planned.notes,
        error=None,
        predicted=planned.predicted,
    )


def _failure(result: StageResult) -> Failure | None:
    """Why a stage does not count: its own failure, or an engine that fails a check."""
    if result.failure is not None:
        return result.failure
    bad = [check for check in result.checks if check.fatal and not check.ok]
    if not bad or result.stage == "artifact":
        return None
    faults = "; ".join(f"{c.name}: expected {c.expected}, found {c.actual}" for c in bad)
    return Failure("invalid", f"the {result.stage} stage fails {faults}")


def _stage_measurements(planned: PlannedCell, outcome: Outcome) -> list[Measurement]:
    """All measurements of stages that count, and the sizes of the artifact."""
    # without its baseline a cell is scored as if it were one; its floor is nobody's
    orphan = planned.baseline_cell_id is not None and outcome.baseline is None
    found = [
        measurement
        for result in outcome.results.values()
        if _failure(result) is None
        for measurement in result.measurements
        if not (orphan and measurement.metric == "kld_floor")
    ]
    known = {measurement.metric for measurement in found}
    sizes = () if outcome.manifest is None else artifacts.measured(outcome.manifest)
    return [*(size for size in sizes if size.metric not in known), *found]


def _checks(outcome: Outcome) -> tuple[Check, ...]:
    """Every check once, its latest verdict: when built, before this use, by the stages."""
    built = () if outcome.manifest is None else outcome.manifest.checks
    of_stages = [check for result in outcome.results.values() for check in result.checks]
    return tuple({check.name: check for check in (*built, *outcome.checks, *of_stages)}.values())


def _observed(planned: PlannedCell, outcome: Outcome, found: Gpu) -> dict[str, Any]:
    stages = {stage: dict(result.observed) for stage, result in outcome.results.items()}
    cell = planned.cell
    remote = registry.runtime(cell.runtime.name).LOADS.remote
    device = asdict(cell.gpu) | {"stated": True} if remote else asdict(found)
    awaits = {} if outcome.uncompared is None else {UNCOMPARED: outcome.uncompared}
    return {"device": device, **awaits, **{stage: seen for stage, seen in stages.items() if seen}}


def _environments(outcome: Outcome) -> dict[str, Any]:
    stages = {stage: dict(result.environment) for stage, result in outcome.results.items()}
    return {stage: seen for stage, seen in stages.items() if seen}


def _timings(outcome: Outcome) -> dict[str, float]:
    """Seconds: own work by stage and phase, and the controller's time by purpose.

    `work_seconds` is what this run's stages and the paired comparison took; a stage that was found
    done is not in it.
    """
    timings = {
        f"{stage}.{phase}_seconds": seconds
        for stage, result in outcome.results.items()
        for phase, seconds in result.seconds.items()
    }
    work = sum(own_seconds(outcome.results[stage]) for stage in outcome.ran)
    work += outcome.seconds.get("compare", 0.0)
    controller = {f"{name}_seconds": seconds for name, seconds in outcome.seconds.items()}
    return timings | controller | {"work_seconds": work}


def _changes(
    planned: PlannedCell, outcome: Outcome, store: Path
) -> tuple[Sequence[Measurement], list[str]]:
    """Per-slice changes against the baseline, paired item by item."""
    quality = outcome.results.get("quality")
    if outcome.baseline is None or quality is None or _failure(quality) is not None:
        return (), []
    from qgrid.measure import compare

    items, base = (_items(store, each.quality_id) for each in (planned, outcome.baseline))
    if items is None or base is None:
        which = "this cell" if items is None else "the baseline"
        return (), [f"slices are not compared: {which} has no results per item"]
    try:
        return compare.paired(items, base), []
    except compare.Unpaired as error:
        return (), [f"slices are not compared: {error}"]


def _items(store: Path, quality_id: str) -> list[dict[str, Any]] | None:
    file = store / "quality" / quality_id / "items.jsonl"
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return None
    except ValueError:
        raise DamagedItems(
            f"{file} is damaged; `python -m qgrid fsck` sets it aside, and the same command "
            "measures it again"
        ) from None
