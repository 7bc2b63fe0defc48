"""The plan of a sweep on disk: whole, named where it is not, and kept while the sweep runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import codec, config, sweep
from qgrid.running import tasks
from qgrid.store import checks, glance, leases, needs
from qgrid.types import PlannedCell
from tests import faults


def write(store: Path, cells: list[PlannedCell]) -> Path:
    return sweep.write_plan(cells, faults.settings(store))


def test_names_may_hold_every_sign_that_ends_a_line_elsewhere(tmp_path: Path) -> None:
    cell = faults.planned(faults.cell(tmp_path))
    model = replace(cell.cell.model, name="a\u2028b\x85c\x0cd")
    cells = [replace(cell, cell=replace(cell.cell, model=model))]
    plan_file = write(tmp_path / "store", cells)
    assert sweep.read_plan(plan_file) == cells
    assert checks.plan(plan_file) is None
    assert needs.artifacts(tmp_path / "store").keys() == {cell.artifact_id}
    assert glance.planned_ids(plan_file) == [(cell.cell_id, cell.artifact_id)]
    found, _, _ = tasks._planned(plan_file, tasks.Task((), (cell.cell_id,)))
    assert found == cells


@pytest.mark.parametrize("name", ["plan.jsonl", "settings.json"])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    plan_file = write(tmp_path / "store", [faults.planned(faults.cell(tmp_path))])
    file = plan_file.with_name(name)
    file.write_text(file.read_text()[:30])
    with pytest.raises(codec.InvalidValue, match=name):
        sweep.run_cells(str(plan_file))


def test_a_sweep_that_runs_keeps_its_plan(tmp_path: Path) -> None:
    cells = [faults.planned(faults.cell(tmp_path, outputs=outputs)) for outputs in (2, 3)]
    folder = write(tmp_path / "store", cells).parent
    (folder / "launches" / "one").mkdir(parents=True)
    sweep._refuse_another_plan(folder, cells[:1])  # nobody is at it
    with leases.held(leases.of(tmp_path / "store", "launches", "one")):
        sweep._refuse_another_plan(folder, cells)  # the same: it joins
        with pytest.raises(config.GridError, match="runs with another plan"):
            sweep._refuse_another_plan(folder, cells[:1])
    sweep._refuse_another_plan(folder, cells[:1])
