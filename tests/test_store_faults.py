"""A full disk, a store that cannot be written to, files that cannot be read, bytes that rot.

Each ends in one sentence, what is finished stays as it is, and the same command goes on once the
fault is mended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import records
from tests import stores
from tests.drills import running, same, trivial
from tests.stores import Made, verb

FULL = "cannot be written to (No space left on device)"
GO_ON = "the same command goes on"
GRID = [
    "method=trivial",
    "model=trivial",
    f"model.id={trivial.MODEL.id}",
    "runtime=trivial",
    "slices=trivial",
    "workload=trivial",
    "context=32",
    "tracking=none",
]


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    stores.install(monkeypatch, tmp_path_factory.mktemp("tmp"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return stores.original(tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    return original.copy(tmp_path / "store")


def finished(made: Made) -> dict[str, bytes]:
    """The bytes of every record, each of which can be read."""
    found = records.read_all(made.store, made.cells)
    return {name: records.path(made.store, name).read_bytes() for name in found}


def numbers(made: Made) -> dict[tuple[str, str, str | None], float]:
    """What was measured, but for what hangs on the moment."""
    return {
        (record.cell_id, each.metric, each.slice): each.value
        for record in records.read_all(made.store, made.cells).values()
        for each in record.measurements
        if each.metric not in same.MOMENTARY_METRICS
    }


def unfinished(store: Path) -> list[Path]:
    return [path for path in store.rglob(".*") if path.name != ".keep"]


def launched(made: Made, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Go on with a sweep, as a user does."""
    return qgrid(["resume", made.folder.name, f"out={made.store}"], cwd)


def qgrid(
    words: list[str], cwd: Path, conf: Path = trivial.CONF, as_nobody: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; as somebody whom the modes of files bind."""
    command = [sys.executable, "-m", "qgrid", *words]
    if GRID[0] in words:
        command += ["--config-dir", str(conf)]
    if as_nobody and os.geteuid() == 0:
        command = [*unprivileged(), *command]
    return subprocess.run(
        command,
        cwd=cwd,
        env=trivial.variables(),
        capture_output=True,
        text=True,
        timeout=running.SECONDS,
    )


def unprivileged() -> list[str]:
    """What runs a command as root without root's right to read everything."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to give up the right to read everything")
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]


def traceless(ended: subprocess.CompletedProcess[str]) -> str:
    """What a command printed, which is no traceback."""
    text = ended.stdout + ended.stderr
    assert "Traceback" not in text, text
    return text


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
        assert ended.returncode == (2 if leave_kib == 0 else 1)
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


# --- configurations that cannot be read ----------------------------------------------------------


def broken_yaml(file: Path) -> None:
    file.write_text("name: trivial\n  bits: [4\n")


def not_text(file: Path) -> None:
    file.write_bytes(b"name: \xff\xfe\n")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def forbidden(file: Path) -> None:
    file.chmod(0)


@pytest.mark.parametrize("spoil", [broken_yaml, not_text, folder, forbidden])
@pytest.mark.parametrize("file", ["workload/trivial.yaml", "runtime/trivial.yaml"])
def test_an_unreadable_configuration_is_a_wrong_command(
    tmp_path: Path, spoil: Callable[[Path], None], file: str
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(trivial.CONF, conf)
    spoil(conf / file)
    store = tmp_path / "store"
    ended = qgrid([*GRID, f"out={store}"], tmp_path, conf=conf, as_nobody=spoil is forbidden)
    text = traceless(ended)
    assert ended.returncode == 2, text
    assert len(ended.stderr.strip().splitlines()) == 1
    assert file.partition("/")[0] in text
    assert not (store / "sweeps").exists()
    shutil.rmtree(conf)
    shutil.copytree(trivial.CONF, conf)
    assert qgrid([*GRID, f"out={store}"], tmp_path, conf=conf).returncode == 0


@pytest.mark.parametrize("spoil", [folder, forbidden, Path.unlink])
@pytest.mark.parametrize("file", ["colours.jsonl", "prose.txt"])
def test_an_unreadable_text_is_a_wrong_command(
    tmp_path: Path, spoil: Callable[[Path], None], file: str
) -> None:
    shutil.copy(trivial.FOLDER / file, tmp_path / file)
    key = "slices.prose.path" if file == "prose.txt" else "slices.items.colours.path"
    spoil(tmp_path / file)
    words = [*GRID, f"{key}={tmp_path / file}", f"out={tmp_path / 'store'}"]
    ended = qgrid(words, tmp_path, as_nobody=spoil is forbidden)
    text = traceless(ended)
    assert ended.returncode == 2, text
    assert file in text
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store" / "sweeps").exists()


@pytest.mark.parametrize("name", ["settings.json", "plan.jsonl", "launcher.json"])
@pytest.mark.parametrize("spoil", [not_text, stores.cut, folder])
def test_a_torn_file_of_a_sweep_is_one_sentence(
    made: Made, tmp_path: Path, spoil: Callable[[Path], None], name: str
) -> None:
    before = finished(made)
    spoil(made.folder / name)
    ended = qgrid(["resume", "trivial", f"out={made.store}"], tmp_path)
    assert ended.returncode == 2, traceless(ended)
    assert len(traceless(ended).strip().splitlines()) == 1
    assert finished(made) == before


# --- bytes that rot ------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": "qgrid.record/1"}'])
def test_a_damaged_record_is_measured_again(made: Made, tmp_path: Path, content: bytes) -> None:
    before = finished(made)
    made.record.write_bytes(content)
    ended = launched(made, tmp_path)
    assert ended.returncode == 0, traceless(ended)
    assert "set_aside" in traceless(ended)
    after = finished(made)
    own = made.cell.cell_id
    assert {k: v for k, v in after.items() if k != own} == {
        k: v for k, v in before.items() if k != own
    }
    assert made.statuses() == {"ok"}
    assert [file.read_bytes() for file in (made.store / "set_aside").iterdir()] == [content]


@pytest.mark.parametrize("file", ["levels.txt", "manifest.json", "config.json"])
def test_a_rotten_artifact_is_told_set_aside_and_built_again(
    made: Made, tmp_path: Path, file: str
) -> None:
    before = finished(made)
    made.record.unlink()
    stores.cut(made.artifact / file)
    ended = launched(made, tmp_path)
    assert ended.returncode == 1, traceless(ended)
    found = records.read(made.store, made.cell.cell_id)
    assert found is not None
    assert found.status == "bad_artifact"
    assert file in str(found.error)
    assert before.items() - finished(made).items() == {
        (made.cell.cell_id, before[made.cell.cell_id])
    }
    assert verb("fsck", made.store) == 0
    ended = launched(made, tmp_path)
    assert ended.returncode == 0, traceless(ended)
    assert made.statuses() == {"ok"}


@pytest.mark.parametrize("whose", ["own", "baseline"])
@pytest.mark.parametrize("file", ["result.json", "items.jsonl"])
def test_a_rotten_quality_result_is_measured_again(
    made: Made, original: Made, tmp_path: Path, whose: str, file: str
) -> None:
    cells = {each.cell_id: each for each in made.cells}
    quality = made.cell if whose == "own" else cells[str(made.cell.baseline_cell_id)]
    before = finished(made)
    stores.cut(made.store / "quality" / quality.quality_id / file)
    made.record.unlink()
    assert verb("fsck", made.store) == 0
    ended = launched(made, tmp_path)
    assert ended.returncode == 0, traceless(ended)
    assert numbers(made) == numbers(original)
    others = {k: v for k, v in before.items() if k != made.cell.cell_id}
    assert others.items() <= finished(made).items()
