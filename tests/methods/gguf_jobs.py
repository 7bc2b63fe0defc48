"""Jobs of `method=gguf` as the plan makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import codec
from qgrid.methods import gguf
from qgrid.types import Cell, Check, Job
from tests import jobs


def options(**changes: Any) -> dict[str, Any]:
    """The YAML's options with changes, as the configuration hands them out."""
    checked = codec.convert(gguf.Options, jobs.options("gguf", **changes))
    plain: dict[str, Any] = codec.plain(checked)
    return plain


def job(make_cell: Callable[..., Cell], store: Path, model: Path, bits: int, **changes: Any) -> Job:
    """The artifact job of a cell whose options are resolved as the plan does it."""
    made = jobs.job(make_cell, store, model, "gguf", bits)
    filled = gguf.resolved(bits, options(**changes))
    cell = replace(made.planned.cell, method=replace(made.planned.cell.method, options=filled))
    artifact_id = codec.digest([str(model), bits, filled])
    planned = replace(made.planned, cell=cell, artifact_id=artifact_id)
    return replace(made, planned=planned, artifact=str(store / "artifacts" / artifact_id))


def named(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if check.fatal and not check.ok]
