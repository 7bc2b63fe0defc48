"""Several launchers on one store: they share the work, and each thing is done once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from qgrid import codec
from tests.drills import running, same, trivial
from tests.drills.once import assert_each_once, begun, launches
from tests.drills.running import launching
from tests.drills.trivial import LEDGER, choice

MANY = 16


@pytest.mark.slow
def test_two_launchers_on_one_sweep_share_it(tmp_path: Path, store: Path, ledger: Path) -> None:
    grid = [choice(8, number=number, pause=0.3) for number in range(8)]
    folder, cells = trivial.write(grid, store)
    with contextlib.ExitStack() as both:
        runs = [both.enter_context(launching(folder, **{LEDGER: str(ledger)})) for _ in range(2)]
        assert [run.wait() for run in runs] == [0, 0], runs[0].log.read_text()
    assert_each_once(ledger, cells)
    assert len(launches(store, cells)) == 2

    alone, _ = trivial.write(grid, tmp_path / "undisturbed")
    assert running.finish(alone) == 0
    assert same.differences(cells, store, alone.parents[1]) == []


def test_a_launcher_that_comes_later_joins(store: Path, ledger: Path) -> None:
    grid = [choice(8, number=number, pause=0.5) for number in range(6)]
    folder, cells = trivial.write(grid, store)
    with launching(folder, **{LEDGER: str(ledger)}) as first:
        first.wait_for(lambda: len(list(store.glob("cells/*/record.json"))) >= 1, "a record")
        with launching(folder, **{LEDGER: str(ledger)}) as second:
            assert (first.wait(), second.wait()) == (0, 0), first.log.read_text()
    assert_each_once(ledger, cells)
    assert len(launches(store, cells)) == 2


def test_one_of_two_launchers_is_killed_and_the_other_does_the_rest(
    store: Path, ledger: Path
) -> None:
    grid = [choice(8, number=number, pause=0.5) for number in range(6)]
    folder, cells = trivial.write(grid, store)
    with launching(folder, **{LEDGER: str(ledger)}) as first:
        first.wait_for(lambda: begun(ledger, "artifact"), "a build")
        with launching(folder, **{LEDGER: str(ledger)}) as second:
            second.wait_for(lambda: len(list(store.glob("cells/*/record.json"))) >= 2, "records")
            first.kill()
            assert second.wait() == 0, second.log.read_text()
    assert len(launches(store, cells)) >= 1
    assert set(begun(ledger, "speed")) == {codec.digest(cell.cell) for cell in cells}


@pytest.mark.slow
def test_many_processes_that_ask_for_one_artifact_build_it_once(tmp_path: Path) -> None:
    """Sixteen sweeps with a cell each, in one store, begin at once; the build takes its time."""
    store, ledger = tmp_path / "outputs", tmp_path / "ledger.jsonl"
    sweeps = [
        trivial.write([choice(4, number=7, pause=3.0, load=number)], store, name=f"s{number}")
        for number in range(MANY)
    ]
    cells = list({cell.cell_id: cell for _, each in sweeps for cell in each}.values())
    with contextlib.ExitStack() as all_of_them:
        runs = [
            all_of_them.enter_context(launching(folder, **{LEDGER: str(ledger)}))
            for folder, _ in sweeps
        ]
        assert [run.wait() for run in runs] == [0] * MANY
    assert len(cells) == 2 * MANY  # with the baseline of each timing
    assert_each_once(ledger, cells)
    assert len(launches(store, cells)) == MANY
    assert list((store / "artifacts").glob(".*")) == []
