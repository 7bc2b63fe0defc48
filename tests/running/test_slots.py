"""Worker slots by device: cards in groups, or cores and memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import device
from qgrid.running import slots
from qgrid.running.slots import Slot
from qgrid.types import PlannedCell
from tests import faults


@pytest.fixture
def cell(tmp_path: Path) -> PlannedCell:
    return faults.planned(faults.cell(tmp_path))


def machine(monkeypatch: pytest.MonkeyPatch, cores: int, cards: int = 0, gib: int = 64) -> None:
    """Let this process see another machine than it runs on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: cores)
    monkeypatch.setattr(device, "memory_bytes", lambda: gib << 30)
    found = [{"uuid": f"GPU-{number}", "index": str(number)} for number in range(cards)]
    monkeypatch.setattr(device, "query", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def wide(cell: PlannedCell, threads: int | None, count: int = 1) -> PlannedCell:
    inner = cell.cell
    runtime, gpu = replace(inner.runtime, threads=threads), replace(inner.gpu, count=count)
    return replace(cell, cell=replace(inner, runtime=runtime, gpu=gpu))


def test_all_cores_for_one_cell_are_one_slot(
    cell: PlannedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cores=8)
    assert slots.find([wide(cell, None)] * 4) == (Slot(),)


def test_cores_are_shared_out(cell: PlannedCell, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cores=8)
    found = slots.find([wide(cell, 2), wide(cell, 4)] * 4)
    assert found == (Slot((0, 1, 2, 3)), Slot((4, 5, 6, 7)))
    assert len(slots.find([wide(cell, 2)] * 3)) == 3  # no more than cells
    assert len(slots.find([wide(cell, None)] * 4, wanted=2)) == 2


def test_memory_limits_the_slots(cell: PlannedCell, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cores=8, gib=64)
    large = replace(wide(cell, 1), predicted={"total_bytes": 20.0 * 2**30})
    assert len(slots.find([large] * 8)) == 2


def test_a_card_a_slot_with_its_share_of_the_cores(
    cell: PlannedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cores=8, cards=4)
    found = slots.find([wide(cell, None)] * 9)
    assert [each.cards for each in found] == [("GPU-0",), ("GPU-1",), ("GPU-2",), ("GPU-3",)]
    assert [each.cores for each in found] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_cells_of_several_cards_get_them_together(
    cell: PlannedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cores=8, cards=4)
    found = slots.find([wide(cell, None, count=2), wide(cell, None)] * 3)
    assert [each.cards for each in found] == [("GPU-0", "GPU-1"), ("GPU-2", "GPU-3")]
    assert slots.find([wide(cell, None, count=4)] * 3) == (
        Slot(None, ("GPU-0", "GPU-1", "GPU-2", "GPU-3")),
    )


def test_refused_cells_take_no_slot(cell: PlannedCell, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cores=8)
    refused = replace(wide(cell, 1), status="unsupported")
    assert slots.find([refused] * 5) == (Slot(),)
