"""Cells and jobs of the runtime `openai`, and the artifact that they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from qgrid import registry
from qgrid.types import Cell, Job, Method, PlannedCell, Runtime, Stage, StageResult

CONF = Path(__file__).parents[2] / "conf"
RUNTIME_KEYS = ("name", "dtype", "speed_dtype", "threads")


def options(base_url: str, **changes: Any) -> dict[str, Any]:
    """The options that the YAML gives, with changes."""
    values: dict[str, Any] = yaml.safe_load((CONF / "runtime" / "openai.yaml").read_text())
    known = {key: value for key, value in values.items() if key not in RUNTIME_KEYS}
    return known | {"base_url": base_url, "retries": 2, "deadline_seconds": 20.0} | changes


def cell(make: Callable[..., Cell], base_url: str, more: dict[str, Any], **changes: Any) -> Cell:
    """A cell about the server at `base_url`; `more` are options of the runtime."""
    runtime = Runtime("openai", "bfloat16", "bfloat16", None, options(base_url, **more))
    return make(**({"runtime": runtime, "method": Method("served", {})} | changes))


def artifact(wanted: Cell, source: Path, out: Path) -> Path:
    """What `method=served` keeps of a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    registry.method("served").quantize(wanted, source, out)
    return out


def job(stage: Stage, wanted: Cell, folder: Path, out: Path, baseline: Path | None = None) -> Job:
    planned = PlannedCell("cell", "artifact", "quality", None, wanted, added=False)
    out.mkdir(parents=True, exist_ok=True)
    base = None if baseline is None else str(baseline)
    return Job(stage, planned, str(folder), base, str(out), str(out.parent))


def values(result: StageResult) -> dict[tuple[str, str | None], float]:
    """Figures by metric and slice."""
    return {(m.metric, m.slice): m.value for m in result.measurements}
