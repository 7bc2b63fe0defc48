"""Records on disk: one JSON a cell, replaced atomically, free of secrets and of NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import codec, redact
from qgrid.files import write_atomic
from qgrid.types import RECORD_SCHEMA, Measurement, PlannedCell, Record, StageResult


class UnreadableRecord(ValueError):
    """A record that this version cannot read; the message names the file and the reason."""


class DamagedRecord(UnreadableRecord):
    """A record that no version can read: cut short, or not what its schema says."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; delete it to measure the cell again")
        self.what = what


def path(store: Path, cell_id: str) -> Path:
    """Where the record of a cell lies."""
    return store / "cells" / cell_id / "record.json"


def write(store: Path, record: Record) -> Path:
    """Replace the record of a cell in one step, without secrets and without NaN."""
    target = path(store, record.cell_id)
    measurements, notes = finite(record.measurements)
    notes = tuple(dict.fromkeys([*record.notes, *notes]))
    save(target, replace(record, measurements=measurements, notes=notes), durable=True)
    return target


def read(store: Path, cell_id: str) -> Record | None:
    """The record of a cell; None when there is none.

    Raises:
        UnreadableRecord: it has another schema; `DamagedRecord`: it does not follow its own.
    """
    return load(path(store, cell_id))


def load(file: Path) -> Record | None:
    """The record in `file`; see `read`."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DamagedRecord(f"{file} is not text ({error.reason})") from None
    schema = _schema(file, text)
    if schema != RECORD_SCHEMA:
        raise UnreadableRecord(
            f"{file} has schema `{schema}`; this qgrid reads `{RECORD_SCHEMA}`: use the version"
            " that wrote it, or delete the file to measure the cell again"
        )
    try:
        return codec.loads(Record, text)
    except codec.UnknownKey as error:
        raise UnreadableRecord(
            f"{file} was written by a newer qgrid ({error}): use that one, or delete the file to"
            " measure the cell again"
        ) from None
    except codec.InvalidValue as error:
        raise DamagedRecord(f"{file} does not follow `{RECORD_SCHEMA}`: {error}") from None


def read_all(store: Path, planned: Iterable[PlannedCell]) -> dict[str, Record]:
    """The records of the planned cells that have one, by cell id, in the order of the plan."""
    found = ((cell.cell_id, read(store, cell.cell_id)) for cell in planned)
    return {cell_id: record for cell_id, record in found if record is not None}


def save(target: Path, value: Any, durable: bool = False) -> None:
    """Write a frozen type as JSON in one step, without secrets and without NaN."""
    data = redact.plain(without_nan(codec.plain(value)))
    write_atomic(
        target, json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n", durable
    )


def save_result(target: Path, result: StageResult) -> None:
    """Write a stage's result; numbers left out of it are named in `observed.notes`."""
    measurements, notes = finite(result.measurements)
    observed = dict(result.observed)
    if notes:
        observed["notes"] = [*observed.get("notes", []), *notes]
    save(target, replace(result, measurements=measurements, observed=observed))


def load_result(file: Path) -> StageResult | None:
    """A stage's result; None when there is none or it was cut short."""
    try:
        return codec.loads(StageResult, file.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, codec.InvalidValue):
        return None


def finite(
    measurements: tuple[Measurement, ...],
) -> tuple[tuple[Measurement, ...], tuple[str, ...]]:
    """The measurements that are numbers, with a note for each that is not.

    A standard error or an interval that is not a number becomes None.
    """
    kept, notes = [], []
    for measurement in measurements:
        if math.isfinite(measurement.value):
            stderr, low, high = map(
                _number, (measurement.stderr, measurement.low, measurement.high)
            )
            kept.append(replace(measurement, stderr=stderr, low=low, high=high))
        else:
            where = f" of {measurement.slice}" if measurement.slice else ""
            notes.append(f"`{measurement.metric}`{where} is {measurement.value} and is left out")
    return tuple(kept), tuple(notes)


def without_nan(value: Any) -> Any:
    """Plain data with None in the place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _schema(file: Path, text: str) -> str:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedRecord(f"{file} is not JSON ({error})") from None
    return str(data.get("schema")) if isinstance(data, dict) else "none"
