"""Whether two stores came to the same: records equal but for when, where and how busily."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgrid.store import records
from qgrid.types import PlannedCell

MOMENTARY_METRICS = {"peak_memory_bytes", "busy_elsewhere"}  # of a process; the rest is told
MOMENTARY = {
    "timings",
    "artifact.seconds",
    "artifact.peak_memory_bytes",
    "observed.artifact.reused",
    "observed.artifact.build_seconds",
    "observed.artifact.build_peak_memory_bytes",
    "observed.speed.load_average",
    "environment.time",
    "environment.load_average",
    "environment.host",
    "environment.git_commit",  # of a checkout that somebody works in
    "environment.launch",
    "environment.job",
    "environment.attempts",
}
MOMENTARY_OF_STAGES = {"stage_seconds", "imported", "launch", "host", "job", "attempts"}
CLOSE = 1e-6  # relative, of floats: sums of times in another order
ROUNDED = 1e-12  # absolute: a spread of equal times is 0 or what is left of their rounding


def differences(cells: Sequence[PlannedCell], one: Path, other: Path) -> list[str]:
    """Where the records, items and artifacts of two stores differ, in words; empty: nowhere."""
    found: list[str] = []
    for cell in cells:
        ours, theirs = _record(one, cell), _record(other, cell)
        found += [f"{cell.cell_id} {text}" for text in _differ(ours, theirs, "record")]
        place = f"quality/{cell.quality_id}/items.jsonl"
        found += _bytes_differ(one / place, other / place, place)
        built = Path("artifacts", cell.artifact_id)
        names = {path.name for store in (one, other) for path in (store / built).iterdir()}
        for name in sorted(names - {"manifest.json"}):  # tells how long the build took
            found += _bytes_differ(one / built / name, other / built / name, name)
    return found


def _record(store: Path, cell: PlannedCell) -> dict[str, Any]:
    """A record as it lies on disk; only a whole one that its own schema reads gets so far."""
    file = records.path(store, cell.cell_id)
    assert records.load(file) is not None, f"{file} is missing"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _bytes_differ(one: Path, other: Path, what: str) -> Iterator[str]:
    contents = [path.read_bytes() if path.is_file() else None for path in (one, other)]
    if contents[0] != contents[1]:
        yield f"{what}: other bytes"


def _differ(one: Any, other: Any, path: str) -> Iterator[str]:
    if _is_momentary(path):
        return
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if path.endswith("measurements[]") and one.get("metric") in MOMENTARY_METRICS:
            one, other = ({**each, "value": None} for each in (one, other))
        for key in sorted({*one, *other}):
            yield from _differ(one.get(key, "absent"), other.get(key, "absent"), f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for ours, theirs in zip(one, other, strict=True):
            yield from _differ(ours, theirs, f"{path}[]")
    elif not _equal(one, other):
        yield f"{path}: {str(one)[:200]} or {str(other)[:200]}"


def _is_momentary(path: str) -> bool:
    inside = path.removeprefix("record.")
    stage = inside.removeprefix("environment.stages.")
    of_stage = stage != inside and stage.partition(".")[2] in MOMENTARY_OF_STAGES
    return inside in MOMENTARY or of_stage


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=CLOSE, abs_tol=ROUNDED)
    return type(one) is type(other) and one == other
