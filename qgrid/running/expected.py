"""What a cell will take, from earlier records of like cells: seconds, and memory of the host."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qgrid import codec
from qgrid.files import write_atomic
from qgrid.types import Cell, PlannedCell

FILE = "expected.json"  # in the store: figures of records by file, size and time; can be made anew


@dataclass(frozen=True)
class Cost:
    """What one cell took. `memory_bytes` is of the host, so it is unknown where a card computed."""

    model: str
    method: str
    bits: int
    runtime: str
    gpu: str
    shape: str  # workload, slices and context
    seconds: float  # all but the artifact
    build_seconds: float | None
    memory_bytes: float | None


class Expected:
    """Figures of earlier cells; the nearest ones speak: the same shape, the same bits, the method.

    Of several equally near ones the largest counts: what is asked of a cluster should suffice.
    """

    def __init__(self, costs: tuple[Cost, ...]) -> None:
        self._groups: dict[tuple[Any, ...], list[Cost]] = {}
        for cost in costs:
            for key in _keys(cost):
                self._groups.setdefault(key, []).append(cost)

    @classmethod
    def load(cls, store: Path) -> Expected:
        """From all records of a store; those that did not change since last time are not read."""
        return cls(tuple(_costs(store)))

    def seconds(self, planned: PlannedCell) -> float | None:
        """A cell from begin to end, its artifact included; None: nothing like it has a record."""
        measuring, build = self.measuring_seconds(planned), self.build_seconds(planned)
        return None if measuring is None else measuring + (0.0 if build is None else build)

    def measuring_seconds(self, planned: PlannedCell) -> float | None:
        """Quality and speed of a cell whose artifact is there."""
        return self._largest(planned, "seconds")

    def build_seconds(self, planned: PlannedCell) -> float | None:
        """Making the artifact of a cell."""
        return self._largest(planned, "build_seconds")

    def memory_bytes(self, planned: PlannedCell) -> float | None:
        """Most memory of the host that a stage of it took; None also where a card computes."""
        return self._largest(planned, "memory_bytes")

    def _largest(self, planned: PlannedCell, figure: str) -> float | None:
        for key in _keys(_described(planned.cell)):
            known = [getattr(cost, figure) for cost in self._groups.get(key, ())]
            if found := [value for value in known if value is not None]:
                return float(max(found))
        return None


def _keys(cost: Cost) -> Iterator[tuple[Any, ...]]:
    """From the nearest kind of likeness to the farthest."""
    yield 0, cost.model, cost.runtime, cost.gpu, cost.method, cost.bits, cost.shape
    yield 1, cost.model, cost.runtime, cost.gpu, cost.method, cost.bits
    yield 2, cost.model, cost.runtime, cost.gpu, cost.method
    yield 3, cost.model, cost.runtime, cost.gpu


def _described(cell: Cell) -> Cost:
    return _cost(codec.plain(cell), 0.0, None, None)


def _cost(
    cell: Mapping[str, Any], seconds: float, build: float | None, memory: float | None
) -> Cost:
    return Cost(
        model=str(cell["model"]["id"]),
        method=str(cell["method"]["name"]),
        bits=int(cell["bits"]),
        runtime=str(cell["runtime"]["name"]),
        gpu=str(cell["gpu"]["name"]),
        shape=_shape(json.dumps([cell["workload"], cell["slices"]["name"], cell["context"]])),
        seconds=seconds,
        build_seconds=build,
        memory_bytes=memory,
    )


@cache
def _shape(text: str) -> str:
    return codec.digest(text)


# --- records -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """What a record's file told when it had this size, time and number."""

    stamp: str
    cost: Cost | None  # None: it is not `ok`, or no record


@dataclass(frozen=True)
class _Memory:
    """The content of `FILE`."""

    records: Mapping[str, _Entry]  # by cell id


def _costs(store: Path) -> Iterator[Cost]:
    """The figures of all records that are `ok`; unreadable ones are somebody else's matter."""
    known = _remembered(store / FILE)
    found: dict[str, _Entry] = {}
    for folder in _folders(store / "cells"):
        file = store / "cells" / folder / "record.json"
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            stat = file.stat()
            stamp = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
            entry = known.get(folder)
            is_same = entry is not None and entry.stamp == stamp
            found[folder] = entry if entry and is_same else _Entry(stamp, _figures(file))
    if found != known:
        with contextlib.suppress(OSError):  # a store that is read-only still has its figures
            write_atomic(store / FILE, codec.dumps(_Memory(found)), durable=False)
    yield from (entry.cost for entry in found.values() if entry.cost is not None)


def _folders(cells: Path) -> list[str]:
    try:
        return sorted(each.name for each in cells.iterdir())
    except FileNotFoundError:
        return []


def _remembered(file: Path) -> Mapping[str, _Entry]:
    try:
        return codec.loads(_Memory, file.read_bytes()).records
    except (OSError, codec.InvalidValue):
        return {}


def _figures(file: Path) -> Cost | None:
    """What a record that is `ok` tells."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["status"] != "ok":
            return None
        timings: Mapping[str, float] = record["timings"]
        own = [value for key, value in timings.items() if key.startswith(("quality.", "speed."))]
        build = record["artifact"].get("seconds")
        return _cost(record["cell"], float(sum(own)), build, _host_memory(record))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _host_memory(record: Mapping[str, Any]) -> float | None:
    """The highest of the build and of timing, where they took memory of the host."""
    if record["cell"]["gpu"]["kind"] != "cpu":
        return None
    peaks = [m["value"] for m in record["measurements"] if m["metric"] == "peak_memory_bytes"]
    built = record["artifact"].get("peak_memory_bytes")
    found = [float(each) for each in (*peaks, built) if each is not None]
    return max(found, default=None)
