"""A full disk, a store that cannot be written to, processes that are killed.

Each ends in one sentence, what is finished stays as it is, and the same command goes on once the
fault is mended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests import stores
from tests.commands import GRID, finished, launched, numbers, qgrid, traceless
from tests.drills import running, trivial
from tests.stores import Made, verb

FULL = "cannot be written to (No space left on device)"
GO_ON = "the same command goes on"
GUARDED = ("artifacts", "builds", "cells", "quality")  # a lease says who writes there


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    stores.install(monkeypatch, tmp_path_factory.mktemp("tmp"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return stores.original(tmp_path_factory.mktemp("original"))


def unfinished(store: Path) -> list[Path]:
    return [path for path in store.rglob(".*") if path.name != ".keep"]


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("leave_kib", [0, 16, 48, 130, 200, 320])
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, original: Made, leave_kib: int) -> None:
    """Wherever it happens: before anything runs, in a build, in a stage, between two records."""
    with stores.small_disk(tmp_path / "disk", 32 << 10) as disk:
        first, _ = trivial.write([trivial.choice()], disk / "store", name="first")
        assert stores.run(first, tmp_path).returncode == 0
        made = Made(disk / "store", tuple(trivial.write(stores.GRID, disk / "store")[1]))
        ballast = stores.fill(disk, leave_kib)
        ended = launched(made, tmp_path)
        before = finished(made)
        assert ended.returncode == 1
        assert FULL in traceless(ended)
        assert GO_ON in traceless(ended)
        assert 1 <= len(before) < len(made.cells)
        assert unfinished(made.store) == []

        ballast.unlink()
        assert verb("fsck", made.store, "--full") == 0
        ended = launched(made, tmp_path)
        assert ended.returncode == 0, traceless(ended)
        after = finished(made)
        assert {name: after[name] for name in before} == before
        assert numbers(made) == numbers(original)
        assert verb("fsck", made.store, "--full", "--dry-run") == 0


def test_where_there_is_no_room_for_the_tables_the_records_are_there(tmp_path: Path) -> None:
    with stores.small_disk(tmp_path / "disk", 32 << 10) as disk:
        folder, cells = trivial.write(stores.GRID, disk / "store")
        ballast = stores.fill(disk, 1 << 10)  # the report alone takes more
        made = Made(disk / "store", tuple(cells))
        ended = launched(made, tmp_path)
        assert ended.returncode != 0
        assert FULL in traceless(ended)
        assert made.statuses() == {"ok"}
        assert not (folder / "report.html").exists()
        ballast.unlink()
        assert launched(made, tmp_path).returncode == 0
        assert (folder / "report.html").exists()


def test_an_artifact_larger_than_the_disk_is_its_cells_end(tmp_path: Path) -> None:
    """Its build leaves nothing, so that there is room again for the record that says why."""
    model = tmp_path / "model"
    shutil.copytree(trivial.MODEL.id, model)
    (model / "weights.bin").write_bytes(os.urandom(12 << 20))
    with stores.small_disk(tmp_path / "disk", 8 << 10) as disk:
        small, large = trivial.choice(), trivial.choice(number=1)
        large = replace(large, model=replace(large.model, id=str(model)))
        first, cells = trivial.write([small], disk / "store")
        assert stores.run(first, tmp_path).returncode == 0
        before = finished(Made(disk / "store", tuple(cells)))
        made = Made(disk / "store", tuple(trivial.write([small, large], disk / "store")[1]))
        ended = launched(made, tmp_path)
        assert ended.returncode == 1
        assert "No space left on device" in traceless(ended)
        assert made.statuses() == {"ok", "crashed"}
        assert before.items() <= finished(made).items()
        assert unfinished(made.store) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert launched(made, tmp_path).returncode == 0
        assert made.statuses() == {"ok"}
        assert before.items() <= finished(made).items()


# --- a store that cannot be written to -----------------------------------------------------------


def test_a_read_only_store_is_one_sentence_and_stays_as_it_is(tmp_path: Path) -> None:
    with stores.small_disk(tmp_path / "disk", 32 << 10) as disk:
        first, _ = trivial.write([trivial.choice()], disk / "store", name="first")
        assert stores.run(first, tmp_path).returncode == 0
        made = Made(disk / "store", tuple(trivial.write(stores.GRID, disk / "store")[1]))
        (made.store / "cells" / ".record.json.a1b2c3d4").write_text("half")
        before = stores.contents(made.store)
        with stores.read_only(disk):
            for words in (
                ["resume", "trivial"],
                ["fsck"],
                ["gc"],
                ["report", "trivial"],
                [*GRID, "bits=2"],
            ):
                ended = qgrid([*words, f"out={made.store}"], tmp_path)
                text = traceless(ended)
                if words in (["fsck"], ["gc"]):
                    assert ended.returncode == 0  # nothing to mend or to free
                else:
                    assert ended.returncode in {1, 2}, text
                    assert "Read-only file system" in text
                    assert GO_ON in text
        assert stores.contents(made.store) == before
        assert launched(made, tmp_path).returncode == 0
        assert made.statuses() == {"ok"}


def test_what_cannot_be_mended_or_freed_is_left_and_told(tmp_path: Path) -> None:
    with stores.small_disk(tmp_path / "disk", 32 << 10) as disk:
        folder, cells = trivial.write(stores.GRID, disk / "store")
        made = Made(disk / "store", tuple(cells))
        assert stores.run(folder, tmp_path).returncode == 0
        made.record.write_text("{")
        with stores.read_only(disk):
            ended = qgrid(["fsck", f"out={made.store}"], tmp_path)
            assert ended.returncode == 1
            assert f"left cells/{made.cell.cell_id}/record.json: cannot be mended" in ended.stdout
            assert "Read-only file system" in traceless(ended)
            assert qgrid(["fsck", f"out={made.store}", "--dry-run"], tmp_path).returncode == 1
        assert made.record.read_text() == "{"
        shutil.rmtree(made.store / "cells")
        shutil.rmtree(made.folder)
        with stores.read_only(disk):
            ended = qgrid(["gc", f"out={made.store}"], tmp_path)
            assert ended.returncode == 1
            assert "cannot be freed: Read-only file system" in traceless(ended)
            assert "freed 0 artifacts" in ended.stdout
        assert made.artifact.exists()
        assert qgrid(["gc", f"out={made.store}"], tmp_path).returncode == 0
        assert not made.artifact.exists()


@pytest.mark.parametrize("place", [".", "cells", "leases", "quality", "sweeps/trivial"])
def test_a_folder_that_may_not_be_written_to_is_one_sentence(
    tmp_path: Path, original: Made, place: str
) -> None:
    made = original.copy(tmp_path / "store")
    shutil.rmtree(made.artifact)
    for folder in (made.record.parent, made.quality):
        shutil.rmtree(folder)
    shutil.rmtree(made.store / "leases")
    (made.store / "leases").mkdir()
    others = {c.cell_id for c in made.cells if c.quality_id != made.cell.quality_id}
    before = {cell_id: text for cell_id, text in finished(made).items() if cell_id in others}
    assert len(before) == 4  # the other cell of that quality is completed
    (made.store / place).chmod(0o555)
    ended = qgrid(["resume", "trivial", f"out={made.store}"], tmp_path, as_nobody=True)
    text = traceless(ended)
    assert ended.returncode in {1, 2}, text
    assert "Permission denied" in text
    assert place.rpartition("/")[2] in text
    assert before.items() <= finished(made).items()
    (made.store / place).chmod(0o755)
    assert launched(made, tmp_path).returncode == 0
    assert made.statuses() == {"ok"}
    assert before.items() <= finished(made).items()


# --- whoever was killed --------------------------------------------------------------------------


@pytest.mark.slow
def test_fsck_clears_up_after_every_kill(tmp_path: Path, original: Made) -> None:
    """All processes of a sweep at once, at moments spread over its run."""
    for number in range(6):
        place = tmp_path / str(number)
        made = Made(place, tuple(trivial.write(stores.GRID, place)[1]))
        with running.launching(made.folder) as sweep:
            with contextlib.suppress(running.Ended):
                sweep.pause(0.15 + 0.2 * number)
            sweep.kill_all()
        before = finished(made)
        assert verb("fsck", place, "--full") == 0
        assert verb("fsck", place, "--full", "--dry-run") == 0
        guarded = [p for p in unfinished(place) if p.relative_to(place).parts[0] in GUARDED]
        assert guarded == []
        assert not (place / "set_aside").exists()
        assert launched(made, tmp_path).returncode == 0
        assert before.items() <= finished(made).items()
        assert numbers(made) == numbers(original)
