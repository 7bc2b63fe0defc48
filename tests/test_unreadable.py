"""Configurations, texts, plans, records, artifacts and results that cannot be read.

Each ends in one sentence or a status, what is finished stays as it is, and the same command goes on
once the fault is mended.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qgrid.store import records
from tests import stores
from tests.commands import GRID, finished, launched, numbers, qgrid, traceless
from tests.drills import trivial
from tests.stores import Made, verb


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    stores.install(monkeypatch, tmp_path_factory.mktemp("tmp"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return stores.original(tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    return original.copy(tmp_path / "store")


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
def test_an_unreadable_configuration_is_a_wrong_command(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(trivial.CONF, conf)
    spoil(conf / "workload" / "trivial.yaml")
    store = tmp_path / "store"
    ended = qgrid([*GRID, f"out={store}"], tmp_path, conf=conf, as_nobody=spoil is forbidden)
    text = traceless(ended)
    assert ended.returncode == 2, text
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "workload" in text
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


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"a": 1}'])
def test_a_damaged_cache_of_hashes_is_begun_anew(
    made: Made, tmp_path: Path, content: bytes
) -> None:
    made.record.unlink()
    (made.store / "hashes.json").write_bytes(content)
    ended = launched(made, tmp_path)
    assert ended.returncode == 0, traceless(ended)
    assert made.statuses() == {"ok"}


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
    if file == "items.jsonl":
        ended = launched(made, tmp_path)
        assert ended.returncode == 1
        assert f"{file} is damaged; `python -m qgrid fsck` sets it aside" in traceless(ended)
        assert records.read_all(made.store, made.cells)[made.cell.cell_id].status == "crashed"
        assert verb("fsck", made.store) == 0
    ended = launched(made, tmp_path)
    assert ended.returncode == 0, traceless(ended)
    assert numbers(made) == numbers(original)
    others = {each.cell_id for each in made.cells if each.cell_id != made.cell.cell_id}
    if file == "items.jsonl":  # what `fsck` has set aside makes its other cells complete, too
        others = {each for each in others if cells[each].quality_id != quality.quality_id}
    assert others
    assert {k: v for k, v in before.items() if k in others}.items() <= finished(made).items()
