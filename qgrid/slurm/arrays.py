"""Which arrays a set of cells becomes: one for each kind of resources, in three waves. Pure.

First the artifacts, each once; then the 16-bit cells that others are compared with; then the rest.
An array waits for the arrays that it builds on, however these end: a cell whose artifact or
baseline is missing makes it itself, so the order is for speed and never for correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from qgrid.running.tasks import Task
from qgrid.slurm.options import Options, features, name
from qgrid.slurm.script import Resources, UnsafeValue
from qgrid.types import Gpu, Limits, PlannedCell

Wave = Literal["builds", "baselines", "cells"]
WAVES: tuple[Wave, ...] = ("builds", "baselines", "cells")
MINUTES = (
    10,
    30,
    60,
    120,
    240,
    480,
    960,
    1440,
    2880,
    5760,
    10080,
)  # limits are rounded up
WORTH_SECONDS = 600.0  # of work in a task: its wait and its start cost some tens of seconds
START_SECONDS = 120.0  # of a task before its first stage: set-up lines, imports on a cold node
MARGIN = 2.0  # of a time limit over what like cells took
MEMORY_MARGIN, BASE_GIB = 1.5, 2  # the same of memory; what a process takes before it measures
CPUS = 4


class Estimates(Protocol):
    """What `expected.Expected` offers; None: nothing is known."""

    def measuring_seconds(self, planned: PlannedCell) -> float | None:
        """Quality and speed of a cell."""

    def build_seconds(self, planned: PlannedCell) -> float | None:
        """Its artifact."""

    def memory_bytes(self, planned: PlannedCell) -> float | None:
        """Of the host."""


@dataclass(frozen=True)
class Terms:
    """What decides beside the cells."""

    estimates: Estimates
    limits: Limits  # the time of a cell of which nothing is known
    options: Options
    max_array_size: int  # of the cluster


@dataclass(frozen=True)
class Array:
    """Tasks that ask for the same; `after` are positions of arrays that come before it."""

    wave: Wave
    resources: Resources
    tasks: tuple[Task, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class _Item:
    """A build or a cell, before it has a task."""

    wave: Wave
    planned: PlannedCell
    asks: Resources  # without its time
    seconds: float | None


def plan(cells: Sequence[PlannedCell], missing: Sequence[PlannedCell], terms: Terms) -> list[Array]:
    """The arrays of `cells`, in the order to submit them.

    Args:
        cells: to be measured, in the order of the plan.
        missing: a cell for each artifact that has to be made first.
        terms: estimates, limits, the user's options, the cluster.

    Raises:
        UnsafeValue: a device's `gres` or `constraint` is no word of Slurm's.
    """
    items = [_item("builds", each, terms) for each in missing]
    for each in cells:
        wave: Wave = "baselines" if each.baseline_cell_id is None else "cells"
        items.append(_item(wave, each, terms))
    arrays: list[Array] = []
    places: dict[tuple[str, str], int] = {}  # of an artifact ("a") or a cell ("c"): its array
    known = {each.cell_id: each for each in cells}
    for wave in WAVES:
        own = [each for each in items if each.wave == wave]
        for resources, tasks in _grouped(own, terms):
            for part in _cut(tasks, terms.max_array_size):
                after = _after(part, known, places) if wave != "builds" else ()
                places |= {("a", each): len(arrays) for task in part for each in task.builds}
                places |= {("c", each): len(arrays) for task in part for each in task.cells}
                arrays.append(Array(wave, resources, part, after))
    return arrays


def asks(planned: PlannedCell, terms: Terms) -> Resources:
    """What a cell needs of a node, all but its time."""
    cell, options = planned.cell, terms.options
    memory = options.memory_gib
    if memory is None:
        memory = _memory_class(terms.estimates.memory_bytes(planned))
    threads = cell.runtime.threads if cell.gpu.kind == "cpu" else None
    cpus = next(each for each in (options.cpus, threads, CPUS) if each is not None)
    return Resources(_gres(cell.gpu), _constraint(cell.gpu, options), cpus, memory, 0)


def _item(wave: Wave, planned: PlannedCell, terms: Terms) -> _Item:
    known = terms.estimates
    own = known.build_seconds if wave == "builds" else known.measuring_seconds
    return _Item(wave, planned, asks(planned, terms), own(planned))


def _gres(gpu: Gpu) -> str | None:
    """`gpu:h100:2`; a CUDA device without a name there is any card, and checked at its start."""
    if gpu.gres is not None:
        return f"gpu:{_checked(name, 'gpu.gres', gpu.gres)}:{gpu.count}"
    return f"gpu:{gpu.count}" if gpu.kind == "cuda" else None


def _constraint(gpu: Gpu, options: Options) -> str | None:
    own = None if gpu.constraint is None else _checked(features, "gpu.constraint", gpu.constraint)
    parts = [each for each in (own, options.constraint) if each is not None]
    several = len(parts) > 1
    return "&".join(f"({each})" if several and "|" in each else each for each in parts) or None


def _checked(check: Callable[[str], str], key: str, value: str) -> str:
    try:
        return check(value)
    except ValueError as error:
        raise UnsafeValue(f"`{key}={value!r}` should be {error}") from None


def _memory_class(expected: float | None) -> int | None:
    """GiB, rounded up to a power of two so that few arrays come of it."""
    if expected is None:
        return None
    gib = expected * MEMORY_MARGIN / 2**30 + BASE_GIB
    return int(2 ** math.ceil(math.log2(gib)))


def _grouped(items: Sequence[_Item], terms: Terms) -> Iterator[tuple[Resources, list[Task]]]:
    """Tasks by what they ask for, the longest first."""
    alike: dict[Resources, list[_Item]] = {}
    for item in items:
        alike.setdefault(item.asks, []).append(item)
    groups: dict[Resources, list[tuple[float, Task]]] = {}
    for resources, members in alike.items():
        for part in _packed(members, terms.options):
            known = [each.seconds for each in part if each.seconds is not None]
            rest = sum(_most(each, terms.limits) for each in part if each.seconds is None)
            minutes = terms.options.minutes
            if minutes is None:
                minutes = _time_class(START_SECONDS + MARGIN * sum(known) + rest)
            group = groups.setdefault(replace(resources, minutes=minutes), [])
            group.append((sum(known) + rest, _task(part)))
    for resources, timed in groups.items():
        timed.sort(key=lambda each: -each[0])
        yield resources, [task for _, task in timed]


def _packed(items: Sequence[_Item], options: Options) -> Iterator[list[_Item]]:
    """Neighbours of the plan together: as many as asked for, else until it is worth a start."""
    part: list[_Item] = []
    for item in items:
        if part and not _has_room(part, item, options):
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def _has_room(part: Sequence[_Item], item: _Item, options: Options) -> bool:
    if options.cells_per_task is not None:
        return len(part) < options.cells_per_task
    seconds = [each.seconds for each in (*part, item)]
    known = [each for each in seconds if each is not None]
    return len(known) == len(seconds) and sum(known) <= WORTH_SECONDS


def _most(item: _Item, limits: Limits) -> float:
    """Seconds after which the stages would be stopped anyway; a cell may score its baseline too."""
    return limits.artifact if item.wave == "builds" else 2 * limits.quality + limits.speed


def _time_class(seconds: float) -> int:
    minutes = math.ceil(seconds / 60)
    return next((each for each in MINUTES if each >= minutes), minutes)


def _task(items: Sequence[_Item]) -> Task:
    is_build = items[0].wave == "builds"
    ids = tuple(each.planned.artifact_id if is_build else each.planned.cell_id for each in items)
    return Task(ids, ()) if is_build else Task((), ids)


def _cut(tasks: Sequence[Task], size: int) -> Iterator[tuple[Task, ...]]:
    """Parts of nearly equal length that the cluster takes as arrays."""
    parts = math.ceil(len(tasks) / max(1, size))
    length = math.ceil(len(tasks) / parts)
    for begin in range(0, len(tasks), length):
        yield tuple(tasks[begin : begin + length])


def _after(
    part: Sequence[Task], known: dict[str, PlannedCell], places: dict[tuple[str, str], int]
) -> tuple[int, ...]:
    """The arrays that make what these cells use: their artifacts, their baselines'."""
    wanted: set[tuple[str, str]] = set()
    for task in part:
        for cell in (known[each] for each in task.cells):
            wanted.add(("a", cell.artifact_id))
            if cell.baseline_cell_id is not None:
                wanted.add(("c", cell.baseline_cell_id))
    return tuple(sorted({places[each] for each in wanted if each in places}))
