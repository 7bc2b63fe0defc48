"""Cells taken apart and put together; paths that a lock can carry to another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid.reproduction import parts
from qgrid.reproduction.lock import Parts
from qgrid.types import Calibration, Cell, Method, Model, PlannedCell, Prose, Slice, Slices

MakeCell = Callable[..., Cell]


def planned(cell: Cell, number: int = 0) -> PlannedCell:
    return PlannedCell(f"cell{number}", "artifact", "quality", None, cell, False)


def test_cells_come_back_and_parts_of_one_name_are_told_apart(make_cell: MakeCell) -> None:
    drawn = Calibration("tiny", "package:qgrid/x", None, None, "train", "text", 8, 64)
    cells = [
        make_cell(),
        make_cell(method=Method("gptq", {"group_size": 64}), bits=4, calibration=drawn),
        make_cell(method=Method("gptq", {"group_size": 128}), bits=4, calibration=drawn),
        make_cell(context=64, seed=3),
    ]
    whole, taken = parts.taken_apart([planned(cell, n) for n, cell in enumerate(cells)])
    assert list(whole.methods) == ["none", "gptq", "gptq 2"]
    assert len(whole.models) == len(whole.runtimes) == len(whole.calibrations) == 1
    assert [parts.put_together(whole, each) for each in taken.values()] == cells


def with_paths(make: MakeCell, model: str, path: str) -> Parts:
    slices = Slices("own", Prose(path, None), {"one": Slice(path, "choice", False, None, 4)})
    drawn = Calibration("own", path, None, None, "train", "text", 8, 64)
    cell = make(model=Model("hf", model, None, False, False), slices=slices, calibration=drawn)
    return parts.taken_apart([planned(cell)])[0]


def paths(whole: Parts) -> set[str | None]:
    own = whole.slices["own"]
    assert own.prose is not None
    return {own.prose.path, own.items["one"].path, whole.calibrations["own"].path}


def test_paths_below_the_root_are_relative_and_found_again_elsewhere(
    make_cell: MakeCell, tmp_path: Path
) -> None:
    for name in ("old", "new"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "items.jsonl").write_text("x")
        (tmp_path / name / "models" / "mine").mkdir(parents=True)
    old, new = tmp_path / "old", tmp_path / "new"
    whole = with_paths(make_cell, str(old / "models" / "mine"), str(old / "data/items.jsonl"))

    carried = parts.portable(whole, old)
    assert carried.models["hf"].id == "./models/mine"
    assert paths(carried) == {"./data/items.jsonl"}

    found = parts.placed(carried, [tmp_path / "nowhere", new, old])
    assert found.models["hf"].id == str(new / "models" / "mine")
    assert paths(found) == {str(new / "data/items.jsonl")}
    assert parts.placed(carried, [tmp_path / "nowhere"]) == carried


def test_other_paths_and_hub_ids_stay(
    make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)  # a folder that is called like a hub id
    root = tmp_path / "root"
    (root / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(root.parent / "org")
    for model in ("org/name", "qgrid/tiny", "/no/such/place"):
        for path in ("package:qgrid.demo/slices/prose.txt", "/no/such/items.jsonl", "gone.jsonl"):
            whole = with_paths(make_cell, model, path)
            carried = parts.portable(whole, root)
            assert carried == whole
            assert parts.placed(carried, [root]) == whole


def test_a_relative_folder_becomes_a_path_that_cannot_be_taken_for_a_hub_id(
    make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    whole = with_paths(make_cell, "models/mine", "package:qgrid/x")
    assert parts.portable(whole, tmp_path).models["hf"].id == "./models/mine"


def test_a_part_that_is_not_there_is_an_error(make_cell: MakeCell) -> None:
    whole, taken = parts.taken_apart([planned(make_cell())])
    with pytest.raises(KeyError, match="gone"):
        parts.put_together(whole, replace(taken["cell0"], runtime="gone"))
