"""Artifacts without weights: what an endpoint serves is stated by the operator, not stored here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qgrid import registry
from qgrid.types import Check, Manifest, Method, PlannedCell
from qgrid.weights import inspection, verification
from qgrid.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from qgrid.weights.building import Work


def holds_none(method: Method) -> bool:
    """Whether artifacts of the method hold a configuration and a tokenizer only."""
    return not registry.support(method).stores_weights


def described(work: Work) -> Manifest:
    """The manifest of a folder without weights; it claims nothing about size and bits.

    Raises:
        BadArtifact: a fatal check fails.
    """
    cell, folder = work.cell, work.folder
    tokenizer = fingerprint(folder)
    checks = [
        check_config(folder),
        *verification.own_checks(folder, cell),
        verification.check_tokenizer(tokenizer, fingerprint(work.source)),
    ]
    verification.require(checks, f"artifact `{work.planned.artifact_id}` of `{cell.method.name}`")
    return Manifest(
        artifact_id=work.planned.artifact_id,
        model=cell.model,
        method=cell.method,
        bits=cell.bits,
        format=registry.support(cell.method).produces[cell.bits],
        files={},
        sizes={},
        modules={},
        dtypes={},
        num_parameters=None,
        bits_per_weight=None,
        linear_bits_per_weight=None,
        tokenizer=tokenizer,
        versions={},
        calibration=None,
        checks=tuple(checks),
        seconds=0.0,
        peak_memory_bytes=None,
    )


def check_config(folder: Path) -> Check:
    """There is a configuration, and no weights that nobody measures."""
    found = inspection.every_weight_file(folder)
    wrong = [] if (folder / "config.json").is_file() else ["config.json is missing"]
    wrong += [f"{path.name} is there" for path in found]
    goal = "a config and a tokenizer, no weights"
    return Check("files", not wrong, goal, "; ".join(wrong) or goal)


def check_manifest(manifest: Manifest, planned: PlannedCell) -> Check:
    """The manifest belongs to this cell."""
    cell = planned.cell
    pairs: Sequence[tuple[str, object, object]] = (
        ("artifact_id", planned.artifact_id, manifest.artifact_id),
        ("method", cell.method, manifest.method),
        ("bits", cell.bits, manifest.bits),
    )
    wrong = [f"{key} says {told}, wanted {asked}" for key, asked, told in pairs if asked != told]
    return Check("manifest", not wrong, "this cell's", "; ".join(wrong) or "this cell's")
