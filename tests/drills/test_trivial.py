"""The trivial cells themselves: real stages and records, equal numbers every time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import codec
from qgrid.store import records
from qgrid.types import PlannedCell, Record
from tests.drills import running, same, trivial
from tests.drills.trivial import choice


def read(store: Path, cell: PlannedCell) -> Record:
    record = records.read(store, cell.cell_id)
    assert record is not None
    return record


def value(record: Record, metric: str) -> float:
    return next(m.value for m in record.measurements if m.metric == metric)


def test_every_stage_is_real_and_every_number_the_same_again(tmp_path: Path, ledger: Path) -> None:
    stores = [tmp_path / "one", tmp_path / "other"]
    for store in stores:
        folder, cells = trivial.write([choice(16), choice(4), choice(4, load=1)], store)
        assert running.finish(folder, **{trivial.LEDGER: str(ledger)}) == 0

    assert same.differences(cells, *stores) == []
    every = {(c.cell.bits, c.cell.workload.name): read(stores[0], c) for c in cells}
    assert sorted(every) == [(bits, f"trivial{load}") for bits in (4, 16) for load in (0, 1)]
    assert {record.status for record in every.values()} == {"ok"}
    plain, narrow, loaded = (every[4 * b, f"trivial{n}"] for b, n in ((4, 0), (1, 0), (1, 1)))
    assert narrow.baseline_cell_id == plain.cell_id
    assert value(narrow, "ppl") != value(plain, "ppl")
    assert 0 < value(narrow, "kld_topk_mean") < 1
    assert value(narrow, "kld_topk_mean") == value(loaded, "kld_topk_mean")
    assert math.isclose(value(narrow, "decode_throughput"), 4000, rel_tol=1e-6)

    notes = trivial.ledger(ledger)
    assert [n["event"] for n in notes].count("begin") == [n["event"] for n in notes].count("end")
    assert sum(note["stage"] == "artifact" for note in notes) == 2 * 2 * 2
    for cell in cells:
        mine = [n for n in notes if n["stage"] == "speed" and n["cell"] == codec.digest(cell.cell)]
        assert len(mine) == 2 * 2


def test_what_is_momentary_does_not_count_and_everything_else_does(tmp_path: Path) -> None:
    stores = [tmp_path / "one", tmp_path / "other"]
    for store in stores:
        folder, cells = trivial.write([choice(16)], store)
        assert running.finish(folder) == 0
    record = read(stores[1], cells[0])

    def changed(**changes: object) -> list[str]:
        records.write(stores[1], replace(record, **changes))  # type: ignore[arg-type]
        return same.differences(cells, *stores)

    assert changed(timings={}) == []
    assert changed(environment={**record.environment, "time": "later", "launch": "another"}) == []
    assert "record.environment.cores" in changed(environment={**record.environment, "cores": 77})[0]
    assert "record.notes" in changed(notes=("something happened",))[0]
    assert "record.measurements" in changed(measurements=record.measurements[:-1])[0]
    worse = [
        replace(m, value=1.001 * m.value) if m.metric == "ppl" else m for m in record.measurements
    ]
    assert "measurements[].value" in changed(measurements=tuple(worse))[0]
    assert changed() == []

    items = stores[1] / "quality" / cells[0].quality_id / "items.jsonl"
    items.write_text(items.read_text()[:-1])
    levels = stores[1] / "artifacts" / cells[0].artifact_id / "levels.txt"
    levels.write_text("")
    found = same.differences(cells, *stores)
    assert [text.partition(":")[0] for text in found] == [
        str(items.relative_to(stores[1])),
        "levels.txt",
    ]


def test_a_torn_artifact_is_seen(store: Path) -> None:
    folder, cells = trivial.write([choice(16)], store)
    assert running.finish(folder) == 0
    artifact = store / "artifacts" / cells[0].artifact_id
    levels = (artifact / "levels.txt").read_text()
    (artifact / "levels.txt").write_text(levels[: len(levels) // 2])
    records.path(store, cells[0].cell_id).unlink()
    assert running.finish(folder) == 1
    assert read(store, cells[0]).status == "bad_artifact"


def test_the_command_line_knows_it_too(store: Path, tmp_path: Path) -> None:
    with running.started(trivial.words(store, "bits=16,8"), tmp_path / "log") as run:
        assert run.wait() == 0, run.log.read_text()
    files = list((store / "cells").glob("*/record.json"))
    assert [json.loads(file.read_text())["status"] for file in files] == ["ok", "ok"]


@pytest.mark.parametrize("bits", [16, 2])
def test_a_ledger_line_is_whole(bits: int, store: Path, ledger: Path) -> None:
    folder, _ = trivial.write([choice(bits)], store)
    assert running.finish(folder, **{trivial.LEDGER: str(ledger)}) == 0
    assert all({"stage", "event", "cell", "pid"} <= note.keys() for note in trivial.ledger(ledger))
