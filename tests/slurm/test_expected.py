"""What like cells took, from their records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid.running import assembly, expected
from qgrid.running.expected import Expected
from qgrid.store import records
from qgrid.types import Cell, Gpu, Measurement, Method, Model, PlannedCell

H100 = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)


@pytest.fixture
def planned(make_cell: Callable[..., Cell]) -> Callable[..., PlannedCell]:
    def make(number: int = 0, bits: int = 4, method: str = "rtn", **changes: Any) -> PlannedCell:
        cell = make_cell(bits=bits, method=Method(method, {}), **changes)
        return PlannedCell(f"{number:016x}", "a", "q", None, cell, False)

    return make


def write(store: Path, planned: PlannedCell, seconds: float, **changes: Any) -> Path:
    record = replace(
        assembly.refused(planned, "ok", "", {}),
        error=None,
        artifact={"seconds": 10.0, "peak_memory_bytes": 2**30},
        measurements=(Measurement("peak_memory_bytes", 3.0 * 2**30, "bytes"),),
        timings={"quality.load_seconds": 1.0, "speed.timing_seconds": seconds - 1, "other": 99.0},
        **changes,
    )
    return records.write(store, record)


def test_nothing_is_known_of_an_empty_store(
    tmp_path: Path, planned: Callable[..., PlannedCell]
) -> None:
    known = Expected.load(tmp_path / "none")
    assert known.seconds(planned()) is None
    assert known.memory_bytes(planned()) is None


def test_the_nearest_speak_and_the_largest_of_them(
    tmp_path: Path, planned: Callable[..., PlannedCell]
) -> None:
    write(tmp_path, planned(1), 40.0)
    write(tmp_path, planned(2), 50.0)
    write(tmp_path, planned(3, context=64), 70.0)
    write(tmp_path, planned(4, bits=8), 90.0)
    write(tmp_path, planned(5, method="awq"), 110.0)
    known = Expected.load(tmp_path)
    assert known.measuring_seconds(planned(9)) == 50.0  # alike in all
    assert known.measuring_seconds(planned(9, context=999)) == 70.0  # but for its shape
    assert known.measuring_seconds(planned(9, bits=2)) == 90.0  # but for its bits
    assert known.measuring_seconds(planned(9, method="gptq")) == 110.0  # but for its method
    assert known.measuring_seconds(planned(9, gpu=H100)) is None
    assert known.measuring_seconds(planned(9, model=Model("x", "x/y", None, False, False))) is None
    assert known.seconds(planned(9)) == 60.0
    assert known.build_seconds(planned(9)) == 10.0


def test_memory_of_the_host_is_known_where_the_host_computes(
    tmp_path: Path, planned: Callable[..., PlannedCell]
) -> None:
    write(tmp_path, planned(1), 40.0)
    write(tmp_path, planned(2, gpu=H100), 40.0)
    known = Expected.load(tmp_path)
    assert known.memory_bytes(planned(9)) == 3.0 * 2**30
    assert known.memory_bytes(planned(9, gpu=H100)) is None
    assert known.seconds(planned(9, gpu=H100)) == 50.0


def test_failures_and_torn_records_say_nothing(
    tmp_path: Path, planned: Callable[..., PlannedCell]
) -> None:
    write(tmp_path, planned(1), 40.0, status="crashed")
    write(tmp_path, planned(2), 50.0).write_text('{"schema": "qgr')
    write(tmp_path, planned(3), 50.0).write_text("[1]")
    write(tmp_path, planned(4), 50.0).write_text('{"status": "ok", "timings": 3}')
    (tmp_path / "cells" / "stray").write_text("")
    assert Expected.load(tmp_path).seconds(planned(9)) is None


def test_a_record_is_read_once_until_it_changes(
    tmp_path: Path, planned: Callable[..., PlannedCell], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, planned(1), 40.0)
    write(tmp_path, planned(2), 30.0)
    read: list[Path] = []
    real = expected._figures

    def noted(file: Path) -> expected.Cost | None:
        read.append(file)
        return real(file)

    monkeypatch.setattr(expected, "_figures", noted)
    assert Expected.load(tmp_path).measuring_seconds(planned(9)) == 40.0
    assert len(read) == 2
    assert Expected.load(tmp_path).measuring_seconds(planned(9)) == 40.0
    assert len(read) == 2
    write(tmp_path, planned(1), 20.0)
    assert Expected.load(tmp_path).measuring_seconds(planned(9)) == 30.0
    assert len(read) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"0000000000000001": 3}', '{"0000000000000001": []}'])
def test_a_damaged_memory_of_it_is_made_anew(
    tmp_path: Path, planned: Callable[..., PlannedCell], text: str
) -> None:
    write(tmp_path, planned(1), 40.0)
    (tmp_path / expected.FILE).write_text(text)
    assert Expected.load(tmp_path).measuring_seconds(planned(9)) == 40.0
    assert isinstance(json.loads((tmp_path / expected.FILE).read_text()), dict)
