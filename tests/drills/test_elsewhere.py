"""Owners whose processes cannot be looked up, as on another machine: dead ones, living ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills import elsewhere, kills, running, same, trivial
from tests.drills.once import begun
from tests.drills.running import launching
from tests.drills.trivial import LEDGER, choice

SILENCE = {"QGRID_LEASE_SECONDS": "3"}


@pytest.mark.slow
def test_a_machine_that_is_lost_is_replaced_by_another(
    tmp_path: Path, store: Path, ledger: Path
) -> None:
    elsewhere.require()
    grid = [choice(8, number=number, pause=1.0) for number in range(3)]
    folder, cells = trivial.write(grid, store)
    told = {LEDGER: str(ledger), **SILENCE}
    with launching(folder, elsewhere.UNDER, **told) as lost:
        lost.wait_for(lambda: len(begun(ledger, "artifact")) >= 2, "a slow build")
        lost.kill_all()
        before = kills.finished(store, cells)
    assert len(before) < len(cells)
    assert running.finish(folder, **told) == 0
    assert before.items() <= kills.finished(store, cells).items()
    alone, _ = trivial.write(grid, tmp_path / "undisturbed")
    assert running.finish(alone) == 0
    assert same.differences(cells, store, alone.parents[1]) == []


@pytest.mark.slow
def test_a_living_machine_is_waited_for(store: Path, ledger: Path) -> None:
    """Its build takes longer than silence is allowed to: heartbeats tell it from a dead one."""
    elsewhere.require()
    folder, cells = trivial.write([choice(8, pause=10.0)], store)
    told = {LEDGER: str(ledger), **SILENCE}
    with launching(folder, elsewhere.UNDER, **told) as far:
        far.wait_for(lambda: len(begun(ledger, "artifact")) >= 2, "the slow build")
        assert running.finish(folder, **told) == 0
        assert far.wait() == 0, far.log.read_text()
    assert set(begun(ledger, "artifact").values()) == {1}
    assert len(kills.finished(store, cells)) == len(cells)
