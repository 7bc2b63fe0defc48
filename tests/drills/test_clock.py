"""A step of the clock, for qgrid's processes only: nothing expires, nobody is taken for dead."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from qgrid.files import write_atomic
from qgrid.store import records
from qgrid.types import Limits
from tests.drills import elsewhere, running, same, trivial
from tests.drills.once import assert_each_once, begun
from tests.drills.running import launching
from tests.drills.trivial import LEDGER, choice

DAY = 86400
WAITED = 10.0  # seconds of a build that is under way when the clock is moved
LONG = 600.0  # seconds that nothing here takes, whatever its clock says


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clock.c`, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler to move the clock of single processes")
    target = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).parent / "clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return target


def dates(store: Path) -> set[str]:
    files = store.glob("cells/*/record.json")
    every = [record for record in map(records.load, files) if record is not None]
    return {str(record.environment["time"])[:10] for record in every}


@pytest.mark.slow
@pytest.mark.parametrize("step", [-2 * DAY, 2 * DAY])
def test_a_step_of_the_clock_between_two_launchers_changes_nothing(
    library: Path, tmp_path: Path, store: Path, ledger: Path, step: int
) -> None:
    elsewhere.require()  # so that they know each other by their heartbeats only
    moved = tmp_path / "moved"
    moved.write_text("0\n")
    told = {LEDGER: str(ledger), "LD_PRELOAD": str(library), "CLOCK_MOVED_BY": str(moved)}
    before, grid = [choice(16)], [choice(8, pause=WAITED)]
    assert running.finish(trivial.write(before, store, name="before")[0], **told) == 0
    folder, cells = trivial.write(grid, store)
    with ExitStack() as both:
        runs = [both.enter_context(launching(folder, elsewhere.UNDER, **told)) for _ in range(2)]
        runs[0].wait_for(lambda: begun(ledger, "artifact").total() == 2, "the slow build")
        log = runs[0].log  # of both; one of the two builds, the other waits for it
        runs[0].wait_for(lambda: log.read_text().count("to run") == 2, "two launchers")
        time.sleep(WAITED / 4)
        write_atomic(moved, f"{step}\n")
        assert [run.wait() for run in runs] == [0, 0], runs[0].log.read_text()

    assert len(dates(store)) == 2  # it was moved in the midst
    assert_each_once(ledger, cells)
    for cell in cells:
        record = records.read(store, cell.cell_id)
        assert record is not None
        assert all(0 <= seconds < LONG for seconds in record.timings.values())
    for each in (before, grid):
        alone, _ = trivial.write(each, tmp_path / "undisturbed")
        assert running.finish(alone) == 0
    assert same.differences(cells, store, alone.parents[1]) == []


def test_a_limit_is_no_matter_of_the_time_of_day(
    library: Path, tmp_path: Path, store: Path
) -> None:
    """A stage may take a minute; that the clock jumps by two days meanwhile is no minute."""
    moved = tmp_path / "moved"
    moved.write_text("0\n")
    limits = Limits(60.0, 60.0, 60.0)
    folder, cells = trivial.write([choice(16, speed_pause=1.0)], store, limits=limits)
    told = {"LD_PRELOAD": str(library), "CLOCK_MOVED_BY": str(moved)}
    with launching(folder, **told) as run:
        run.wait_for(lambda: list(store.glob("cells/*/speed/job.json")), "the timing")
        write_atomic(moved, f"{2 * DAY}\n")
        assert run.wait() == 0, run.log.read_text()
    record = records.read(store, cells[0].cell_id)
    assert record is not None
    assert record.status == "ok"
    assert all(0 <= seconds < LONG for seconds in record.timings.values())
