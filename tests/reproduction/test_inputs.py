"""Hashes of what a sweep reads, computed here from the same files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from qgrid import models
from qgrid.envs import locks
from qgrid.files import HashCache
from qgrid.reproduction import inputs, parts
from qgrid.reproduction.lock import Inputs
from qgrid.types import Calibration, Cell, Model, PlannedCell, Prose, Slice, Slices

MakeCell = Callable[..., Cell]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read(cell: Cell, tmp_path: Path) -> tuple[Inputs, list[str]]:
    whole, _ = parts.taken_apart([PlannedCell("c", "a", "q", None, cell, False)])
    return inputs.read(whole, HashCache(tmp_path / "hashes.json"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_embedded_model_is_its_files(make_cell: MakeCell, tmp_path: Path) -> None:
    found, missing = read(make_cell(), tmp_path)
    folder = models.located(make_cell().model)
    assert folder is not None
    hashes = found.models["tiny"]
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(hashes)
    assert hashes == {name: sha256((folder / name).read_bytes()) for name in hashes}
    assert missing == []


def test_a_hub_s_cache_names_its_commit_and_is_not_read_through(
    make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub" / "models--org--name"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    large, small = "ab" * 32, "cd" * 20  # a large file is called by its sha256, a small one is not
    (root / "blobs" / large).write_bytes(b"not read: its name is its hash")
    (root / "blobs" / small).write_bytes(b"{}")
    (snapshot / "model.safetensors").symlink_to(root / "blobs" / large)
    (snapshot / "config.json").symlink_to(root / "blobs" / small)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    found, missing = read(make_cell(model=Model("hf", "org/name", None, False, False)), tmp_path)
    assert found.models["hf"] == {
        "commit": COMMIT,
        "model.safetensors": large,
        "config.json": sha256(b"{}"),
    }
    assert missing == []


def test_a_hub_id_that_is_not_here_is_no_fault(make_cell: MakeCell, tmp_path: Path) -> None:
    found, missing = read(make_cell(model=Model("hf", "org/gone", None, False, False)), tmp_path)
    assert (found.models["hf"], missing) == ({}, [])


def test_every_missing_file_is_named_once(make_cell: MakeCell, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    cell = make_cell(
        model=Model("hf", gone, None, False, False),
        calibration=Calibration("own", f"{gone}.txt", None, None, "train", "text", 8, 64),
        slices=Slices(
            "own", Prose(f"{gone}.p", None), {"s": Slice(f"{gone}.s", "exact", False, None, 4)}
        ),
    )
    found, missing = read(cell, tmp_path)
    starts = ("`model=hf`: ", "`calibration=own`: ", "`slices=own`: ", "`slices=own`: ")
    assert len(missing) == len(starts)
    assert all(text.startswith(start) for text, start in zip(missing, starts, strict=True))
    assert found.slices["own"] == {"items.s": None, "prose": None}


def test_a_hub_s_data_set_is_its_name_and_revision(make_cell: MakeCell, tmp_path: Path) -> None:
    drawn = Calibration("hub", None, "org/texts", "abc", "train", "text", 8, 64)
    found, missing = read(make_cell(calibration=drawn), tmp_path)
    assert found.calibrations["hub"] == {
        "dataset": "org/texts",
        "revision": "abc",
        "split": "train",
    }
    assert missing == []


def test_pins_are_those_of_the_environments_in_use(make_cell: MakeCell) -> None:
    assert inputs.pins([make_cell(), make_cell()]) == {"main": dict(locks.pins("main", "cpu"))}
