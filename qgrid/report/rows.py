"""One row a planned cell: the plan's wish joined with the record's truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qgrid import timing
from qgrid.report import axes, compare
from qgrid.types import Measurement, PlannedCell, Record

NOT_RUN = "not run"
ALONE = "concurrency=1"
_LOADS = ("concurrency", "rate")
_OF_LOAD = ("timing_cv", "merged_first_tokens", "failed_requests")  # what makes it unstable
Measured = Mapping[tuple[str, str | None], Measurement]  # by metric and part


@dataclass(frozen=True)
class Row:
    """A cell of the sweep. `baseline` holds the measurements of the cell it compares with."""

    planned: PlannedCell
    record: Record | None
    labels: Mapping[str, str]
    measured: Measured
    baseline: Measured

    @property
    def status(self) -> str:
        """The record's status, else the plan's refusal, else `not run`."""
        if self.record is not None:
            return self.record.status
        return NOT_RUN if self.planned.status is None else self.planned.status

    @property
    def reason(self) -> str | None:
        """Why the status is not `ok`, in one sentence."""
        if self.record is not None and self.record.error is not None:
            return self.record.error.message
        return self.planned.reason

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of the plan and of the record."""
        recorded = () if self.record is None else self.record.notes
        return tuple(dict.fromkeys([*self.planned.notes, *recorded]))

    @property
    def is_baseline(self) -> bool:
        """Whether other cells are compared with this one."""
        return self.planned.baseline_cell_id is None

    @property
    def name(self) -> str:
        """What a sentence calls the cell: `gptq at 4 bits`, with every axis that varies."""
        method, bits, *others = self.labels.values()
        tail = f" ({', '.join(others)})" if others else ""
        return f"{method} at {bits} bits{tail}"

    def get(self, metric: str, part: str | None = None) -> Measurement | None:
        """The measurement of a metric; `part` is a slice or `concurrency=N`."""
        return self.measured.get((metric, part))

    def ratio(self, metric: str, part: str) -> compare.Ratio | None:
        """This cell over its baseline; None where a gain must not be claimed or is unknown."""
        base = self.baseline
        unstable = _is_unstable(base, part) or self.is_unstable(part)
        if self.is_baseline or self.is_decompressed or unstable:
            return None
        return compare.ratio(self.get(metric, part), base.get((metric, part)))

    def is_unstable(self, part: str) -> bool:
        """Whether repeats of a timing scatter by more than 5 %, or others were in its way."""
        return _is_unstable(self.measured, part)

    @property
    def changes(self) -> dict[str, Measurement]:
        """Slice -> paired change of accuracy against the baseline."""
        names = self.planned.cell.slices.items
        found = ((name, self.get("accuracy_delta", name)) for name in names)
        return {name: change for name, change in found if change is not None}

    @property
    def fallen(self) -> list[str]:
        """Slices that fell against the baseline, multiplicity corrected."""
        changes = self.changes
        exact = ((name, self.get("mcnemar_p", name)) for name in changes)
        return compare.fallen(changes, {name: p.value for name, p in exact if p is not None})

    @property
    def is_decompressed(self) -> bool:
        """Whether the runtime unpacked the stored weights into another format to compute."""
        return self.observed("decompressed") is True

    @property
    def unpacking(self) -> str:
        """What a runtime that unpacks does, from what it was seen to do."""
        stored, computed = self.observed("stores_in"), self.observed("computes_in")
        return f"stores {_formats(stored)}, computes in {_formats(computed)}"

    @property
    def kernel(self) -> str | None:
        """What multiplied by the quantized layers, where the engine told."""
        told = self.observed("kernel")
        return None if told is None else str(told)

    @property
    def asked_kernel(self) -> str | None:
        """The kernel that the cell names; None where it leaves the choice to the runtime."""
        asked = self.planned.cell.runtime.options.get("kernel")
        return None if asked in (None, "auto") else str(asked)

    @property
    def has_other_kernel(self) -> bool:
        """Whether another kernel came up than the one that was asked for."""
        checks = () if self.record is None else self.record.checks
        return any(check.name == "kernel" and not check.ok for check in checks)

    def observed(self, key: str) -> Any:
        """What a stage saw of the engine; the speed stage's word counts first."""
        if self.record is None:
            return None
        for stage in ("speed", "quality", "artifact"):
            if (told := self.observed_in(stage, key)) is not None:
                return told
        return self.record.observed.get(key)

    def observed_in(self, stage: str, key: str) -> Any:
        """What one stage saw of the engine."""
        part = {} if self.record is None else self.record.observed.get(stage)
        return part.get(key) if isinstance(part, Mapping) else None


def _is_unstable(measured: Measured, part: str) -> bool:
    of_load = (measured.get((metric, part)) for metric in _OF_LOAD)
    return timing.is_unstable(*of_load, measured.get(("busy_elsewhere", None)))


def _formats(seen: object) -> str:
    """`{"int4": 28, "bfloat16": 1}` as `28 x int4, 1 x bfloat16`."""
    if isinstance(seen, Mapping):
        return ", ".join(f"{count} x {name}" for name, count in seen.items())
    return "an unknown format" if seen is None else str(seen)


def groups(planned: Sequence[PlannedCell], records: Sequence[Record]) -> list[list[Row]]:
    """Rows of cells that share a baseline, so that their quality compares; the baseline leads.

    Within a group the methods keep the order of the plan, wider weights first.
    """
    by_id = {record.cell_id: record for record in records}
    measured: dict[str | None, Measured] = {
        record.cell_id: {(m.metric, m.slice): m for m in record.measurements} for record in records
    }
    labels = axes.labels([each.cell for each in planned])
    found: dict[str, list[Row]] = {}
    for each, names in zip(planned, labels, strict=True):
        key = each.cell_id if each.baseline_cell_id is None else each.baseline_cell_id
        own, base = measured.get(each.cell_id, {}), measured.get(each.baseline_cell_id, {})
        row = Row(each, by_id.get(each.cell_id), names, own, base)
        found.setdefault(key, []).append(row)
    return [_ordered(rows) for rows in found.values()]


def _ordered(rows: Sequence[Row]) -> list[Row]:
    methods: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.planned.status is not None):
        methods.setdefault(row.labels["method"], len(methods))
    return sorted(
        rows,
        key=lambda row: (
            not row.is_baseline,
            methods[row.labels["method"]],
            -row.planned.cell.bits,
        ),
    )


def slices(rows: Sequence[Row]) -> list[str]:
    """Names of the slices with a score in any row, in the order of the configuration."""
    names = dict.fromkeys(name for row in rows for name in row.planned.cell.slices.items)
    return [name for name in names if any(row.get("accuracy", name) for row in rows)]


@dataclass(frozen=True, order=True)
class Load:
    """A closed loop of `number` users, or an open one of `number` requests a second."""

    is_open: bool
    number: float


def load(part: str) -> Load | None:
    """The load that `concurrency=8` or `rate=2` names; None for the name of a slice."""
    head, _, number = part.partition("=")
    if head not in _LOADS:
        return None
    try:
        return Load(head == "rate", float(number))
    except ValueError:
        return None


def loads(rows: Sequence[Row], metric: str) -> list[str]:
    """The loads that a metric was measured at: users, fewest first, then rates."""
    return in_order(
        {part for row in rows for name, part in row.measured if name == metric and part}
    )


def in_order(parts: Iterable[str]) -> list[str]:
    """Those of the parts that are loads: users, fewest first, then rates."""
    known = [(found, part) for part in parts if (found := load(part)) is not None]
    return [part for _, part in sorted(known)]


def is_closed(part: str) -> bool:
    """Whether a load is a number of users, who wait for their answers."""
    found = load(part)
    return found is not None and not found.is_open


def load_name(part: str) -> str:
    """`batch 8` for `concurrency=8`, `2 req/s` for `rate=2`."""
    found = load(part)
    if found is None:
        return part
    return f"{found.number:g} req/s" if found.is_open else f"batch {found.number:g}"
