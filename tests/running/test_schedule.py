"""The order of work: artifacts before their cells, baselines first, the longest first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qgrid.running import schedule
from qgrid.running.schedule import Build, Queue, Unit
from qgrid.running.stopping import Stop, Stopped
from qgrid.types import PlannedCell
from tests import faults

Make = Callable[..., PlannedCell]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A planned cell by name: `make("c", artifact="a", baseline="b")`."""
    cell = faults.cell(tmp_path)

    def one(name: str, artifact: str, baseline: str | None = None) -> PlannedCell:
        return PlannedCell(name, artifact, f"q-{name}", baseline, cell, added=False)

    return one


def queue(
    builds: Sequence[Build], cells: Sequence[PlannedCell], slots: int = 1, stop: Stop | None = None
) -> Queue:
    by_id = {each.cell_id: each for each in cells}
    ending = Stop() if stop is None else stop
    return Queue(
        builds, cells, lambda each: by_id.get(str(each.baseline_cell_id)), ending.check, slots
    )


def name(unit: Unit | None) -> str:
    assert unit is not None
    return f"build {unit.artifact_id}" if isinstance(unit, Build) else unit.cell_id


def test_a_build_for_each_artifact_that_is_missing(make: Make) -> None:
    base = make("base", "16")
    cells = [make("x", "4", "base"), make("y", "4", "base"), make("z", "8", "base")]
    builds = schedule.needed(cells, lambda _: base, lambda artifact: artifact == "8")
    assert [build.artifact_id for build in builds] == ["16", "4"]
    assert schedule.needed(cells, lambda _: None, lambda _: True) == []


def test_nothing_known_keeps_the_order_with_baselines_first(make: Make) -> None:
    cells = [make("x", "4", "base"), make("y", "8", "base"), make("base", "16")]
    assert [c.cell_id for c in schedule.ordered(cells, lambda _: None)] == ["base", "x", "y"]


def test_the_longest_group_first_and_its_longest_cell(make: Make) -> None:
    seconds = {"a1": 1.0, "b1": 5.0, "a2": 9.0, "b2": 7.0, "base": 0.5}
    cells = [
        make("a1", "a", "base"),
        make("b1", "b", "base"),
        make("a2", "a", "base"),
        make("b2", "b", "base"),
        make("base", "16"),
    ]
    found = schedule.ordered(cells, lambda each: seconds[each.cell_id])
    assert [each.cell_id for each in found] == ["base", "a2", "a1", "b2", "b1"]


def test_one_slot_finishes_the_cells_of_an_artifact_before_the_next(make: Make) -> None:
    cells = [make("x", "a"), make("y", "b")]
    todo = queue([Build(each) for each in cells], cells)
    seen = []
    for _ in range(4):
        unit = todo.take()
        assert unit is not None
        seen.append(name(unit))
        todo.done(unit)
    assert seen == ["build a", "x", "build b", "y"]
    assert todo.take() is None


def test_several_slots_build_ahead(make: Make) -> None:
    cells = [make("x", "a"), make("y", "b"), make("z", "c")]
    todo = queue([Build(each) for each in cells], cells, slots=2)
    first, second = todo.take(), todo.take()
    assert [name(first), name(second)] == ["build a", "build b"]
    assert first is not None
    todo.done(first)
    assert name(todo.take()) == "build c"  # one cell is ready, two slots want work
    assert name(todo.take()) == "x"


def test_a_cell_waits_for_its_own_artifact_and_for_its_baseline_s(make: Make) -> None:
    base, cell = make("base", "16"), make("x", "4", "base")
    builds = [Build(base), Build(cell)]
    todo = queue(builds, [base, cell], slots=3)
    assert [todo.take(), todo.take()] == builds
    todo.done(builds[1])
    took: list[str] = []
    thread = threading.Thread(target=lambda: took.append(name(todo.take())))
    thread.start()
    thread.join(0.3)
    assert took == []
    todo.done(builds[0])
    thread.join(faults.SECONDS)
    assert took == ["base"]


def test_what_another_process_does_comes_back_after_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "AGAIN_SECONDS", 0.2)
    cells = [make("x", "a"), make("y", "b")]
    todo = queue([], cells)
    first = todo.take()
    assert first is not None
    todo.defer(first)
    assert name(todo.take()) == "y"
    assert name(todo.take()) == "x"


def test_a_stop_ends_the_waiting(make: Make) -> None:
    stop = Stop()
    build = Build(make("x", "a"))
    todo = queue([build], [make("x", "a")], stop=stop)
    assert todo.take() is build
    threading.Timer(0.1, lambda: stop.set("told to")).start()
    with pytest.raises(Stopped, match="told to"):
        todo.take()
