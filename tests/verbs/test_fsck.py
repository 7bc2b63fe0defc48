"""Every fault of a store is found and mended, and nothing else is touched."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from qgrid import files
from qgrid.store import leases
from tests import stores
from tests.stores import Made, cut, verb

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return stores.original(tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    stores.install(monkeypatch, tmp_path / "tmp")
    return original.copy(tmp_path / "store")


# --- what is set aside ---------------------------------------------------------------------------


def rewrite(file: Path, **changes: object) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def without(file: Path) -> Path:
    """The folder of a file that is gone."""
    file.unlink()
    return file.parent


def misplaced(made: Made) -> Path:
    """Another cell's record."""
    other = next(each for each in made.cells if each.cell_id != made.cell.cell_id)
    (made.store / "cells" / other.cell_id / "record.json").replace(made.record)
    return made.record


FAULTS: dict[str, tuple[Callable[[Made], Path], str]] = {
    "record, cut": (lambda m: cut(m.record), "is not JSON"),
    "record, empty": (lambda m: write(m.record, b""), "is not JSON"),
    "record, bytes": (lambda m: write(m.record, b'{"schema": "\xff"}'), "is not UTF-8"),
    "record, nested": (lambda m: write(m.record, b"[" * 100_000), "is not JSON"),
    "record, list": (lambda m: write(m.record, b"[]"), "is not a JSON object"),
    "record, no schema": (lambda m: write(m.record, b"{}"), "cannot be read"),
    "record, wrong type": (lambda m: rewrite(m.record, timings=3), "`timings=3`"),
    "record, another's": (misplaced, "in a folder named"),
    "artifact, no manifest": (lambda m: without(m.artifact / "manifest.json"), "to its end"),
    "artifact, manifest": (lambda m: cut(m.artifact / "manifest.json").parent, "cannot be read"),
    "artifact, cut": (lambda m: cut(m.artifact / "levels.txt").parent, "levels.txt has"),
    "artifact, lost": (lambda m: without(m.artifact / "config.json"), "config.json is missing"),
    "artifact, more": (
        lambda m: write(m.artifact / "model.safetensors", b"x").parent,
        "not in the manifest",
    ),
    "artifact, moved": (lambda m: m.artifact.rename(m.artifact.with_name("moved")), "named `moved"),
    "quality": (lambda m: cut(m.quality / "result.json").parent, "cannot be read"),
    "items, cut": (lambda m: cut(m.quality / "items.jsonl").parent, "in the middle of a line"),
    "items, torn": (
        lambda m: write(m.quality / "items.jsonl", b'{"id": "c0"}\n{"id\n').parent,
        "line 2 of `items.jsonl`",
    ),
    "items, lost": (lambda m: without(m.quality / "items.jsonl"), "no `items.jsonl`"),
    "speed": (lambda m: cut(m.record.parent / "speed" / "result.json"), "cannot be read"),
    "hashes": (lambda m: write(m.store / "hashes.json", b"{"), "is not JSON"),
    "hashes, entry": (lambda m: write(m.store / "hashes.json", b'{"a": 1}'), "holds an entry"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_broken_is_set_aside_whole(made: Made, capsys: Capture, name: str) -> None:
    plant, expected = FAULTS[name]
    broken = plant(made)
    parent, place = made.store, str(broken.relative_to(made.store))
    before = stores.contents(parent)

    assert verb("fsck", parent, "--dry-run") == 1
    assert stores.contents(parent) == before
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert told[0].startswith(f"would be set aside {place}: ")
    assert expected in told[0]
    assert told[1].endswith("1 would be mended, 0 left")

    assert verb("fsck", parent) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("1 mended, 0 left")
    aside = list((parent / "set_aside").iterdir())
    assert len(aside) == 1
    moved = {key: value for key, value in before.items() if (parent / key).is_relative_to(broken)}
    after = {str(aside[0].relative_to(parent)) + key[len(place) :]: moved[key] for key in moved}
    kept = {key: value for key, value in before.items() if key not in moved}
    assert stores.contents(parent) == {**kept, **after, "set_aside": None}

    assert verb("fsck", parent, "--full") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(": sound")


def test_only_full_reads_every_byte(made: Made, capsys: Capture) -> None:
    file = made.artifact / "levels.txt"
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert verb("fsck", made.store) == 0
    assert capsys.readouterr().out.endswith(": sound\n")
    assert verb("fsck", made.store, "--full") == 0
    assert "levels.txt has another sha256" in capsys.readouterr().out
    assert not made.artifact.exists()


def test_a_sound_store_is_not_touched(made: Made, capsys: Capture) -> None:
    before = stores.contents(made.store)
    for flags in ((), ("--dry-run",), ("--full",), ("--dry-run", "--full")):
        assert verb("fsck", made.store, *flags) == 0
        told = capsys.readouterr().out
        assert told == "6 records, 3 artifacts, 3 quality results, 1 plans: sound\n"
    assert stores.contents(made.store) == before


def test_what_was_set_aside_is_made_again(made: Made) -> None:
    cut(made.record)
    cut(made.artifact / "levels.txt")
    cut(made.quality / "items.jsonl")
    assert verb("fsck", made.store) == 0
    assert made.finish() == 0
    assert made.statuses() == {"ok"}
    assert verb("fsck", made.store, "--full", "--dry-run") == 0


# --- what is left to the user --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda m: rewrite(m.record, schema="qgrid.record/99"), "schema `qgrid.record/99`"),
        (lambda m: cut(m.folder / "plan.jsonl"), "in the middle of a line; run the sweep's grid"),
        (lambda m: write(m.folder / "plan.jsonl", b"{}\n"), "line 1"),
        (lambda m: cut(m.folder / "settings.json"), "run the sweep's grid again"),
        (lambda m: cut(m.folder / "launcher.json"), "run the sweep's grid again"),
    ],
)
def test_what_only_the_user_knows_is_left(
    made: Made, capsys: Capture, plant: Callable[[Made], Path], expected: str
) -> None:
    place = plant(made).relative_to(made.store)
    before = stores.contents(made.store)
    for flags in ((), ("--dry-run",)):
        assert verb("fsck", made.store, *flags) == 1
        told = capsys.readouterr().out.splitlines()
        assert told[0].startswith(f"left {place}: ")
        assert expected in told[0]
        assert told[1].endswith("0 mended, 1 left" if not flags else "0 would be mended, 1 left")
    assert stores.contents(made.store) == before


# --- what was being written ----------------------------------------------------------------------


def unfinished(made: Made) -> dict[Path, Path]:
    """Remains of every place where files are written aside, each with the lease of its writer."""
    store, cell = made.store, made.cell
    of_artifact = leases.of(store, "artifacts", cell.artifact_id)
    (store / "builds" / cell.artifact_id).mkdir(parents=True, exist_ok=True)
    remains = {
        made.record.parent / ".record.json.a1b2c3d4": leases.of(store, "cells", cell.cell_id),
        made.record.parent / "speed" / ".result.json.abc_1234": leases.of(
            store, "cells", cell.cell_id
        ),
        made.quality / ".items.jsonl.abcdefgh": leases.of(store, "quality", cell.quality_id),
        store / "builds" / cell.artifact_id / ".job.json.12345678": of_artifact,
    }
    for file in remains:
        file.write_text("half")
    for name in (f".{cell.artifact_id}.x1y2z3_4", f".{cell.artifact_id}.old"):
        folder = store / "artifacts" / name
        folder.mkdir()
        (folder / "half.safetensors").write_text("half")
        remains[folder] = of_artifact
    return remains


def test_what_the_dead_left_unfinished_is_removed(made: Made, capsys: Capture) -> None:
    before = stores.contents(made.store)
    remains = unfinished(made)
    for lease in set(remains.values()):
        stores.held_by_the_dead(lease)
    assert verb("fsck", made.store, "--dry-run") == 1
    assert all(path.exists() for path in remains)
    told = capsys.readouterr().out
    for path in {*remains, *remains.values()}:
        assert str(path.relative_to(made.store)) in told
    assert verb("fsck", made.store) == 0
    after = stores.contents(made.store)
    assert {key: after[key] for key in after if not key.startswith("builds")} == {
        key: before[key] for key in before if not key.startswith("builds")
    }
    assert verb("fsck", made.store, "--dry-run") == 0


def test_an_artifact_that_was_to_be_replaced_is_put_back(made: Made, capsys: Capture) -> None:
    artifact = made.store / "artifacts" / made.cell.artifact_id
    before = stores.contents(made.store)
    artifact.rename(files.before(artifact))
    stores.held_by_the_dead(leases.of(made.store, "artifacts", made.cell.artifact_id))
    assert verb("fsck", made.store, "--dry-run") == 1
    assert not artifact.exists()
    assert verb("fsck", made.store) == 0
    assert f"put back artifacts/.{artifact.name}.old" in capsys.readouterr().out
    assert stores.contents(made.store) == before


def test_what_the_living_are_writing_is_left_alone(made: Made, capsys: Capture) -> None:
    remains = unfinished(made)
    with ExitStack() as living:
        for lease in set(remains.values()):
            living.enter_context(stores.holder(lease))
        for flags in ((), ("--dry-run",)):
            assert verb("fsck", made.store, *flags) == 0
            assert capsys.readouterr().out.endswith(": sound\n")
    assert all(path.exists() for path in remains)


def test_where_no_lease_tells_age_does(made: Made) -> None:
    """By the clock of the file system, so that a step of this machine's changes nothing."""
    files = {
        name: made.store / name
        for name in (".hashes.json.a1b2c3d4", "sweeps/trivial/.plan.jsonl.a1b2c3d4")
    }
    for file in files.values():
        file.write_text("half")
    assert verb("fsck", made.store) == 0
    assert all(file.exists() for file in files.values())
    for file in files.values():
        os.utime(file, (time.time() - 3600, time.time() - 3600))
    assert verb("fsck", made.store) == 0
    assert not any(file.exists() for file in files.values())


def test_files_of_others_are_left_alone(made: Made) -> None:
    strange = [
        made.store / ".gitignore",
        made.store / "notes.txt",
        made.record.parent / ".nfs0000000000000001",
        made.store / "artifacts" / ".keep",
        made.artifact / ".config.json.a1b2c3d4",  # of an artifact's own files nothing is guessed
    ]
    for file in strange:
        file.write_text("mine")
        os.utime(file, (0, 0))
    assert verb("fsck", made.store, "--full") == 0
    assert all(file.exists() for file in strange)


# --- who is at work ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cells", "artifacts", "quality"])
def test_under_a_living_lease_nothing_is_mended(made: Made, capsys: Capture, kind: str) -> None:
    names = {
        "cells": (made.cell.cell_id, made.record),
        "artifacts": (made.cell.artifact_id, made.artifact / "manifest.json"),
        "quality": (made.cell.quality_id, made.quality / "result.json"),
    }
    name, file = names[kind]
    cut(file)
    before = stores.contents(made.store)
    with stores.holder(leases.of(made.store, kind, name)):  # type: ignore[arg-type]
        for flags in ((), ("--dry-run",)):
            assert verb("fsck", made.store, *flags) == 1
            assert "it is being worked on" in capsys.readouterr().out
    assert stores.contents(made.store) == before
    assert verb("fsck", made.store) == 0


@pytest.mark.parametrize("role", ["own", "baseline"])
def test_what_a_cell_at_work_uses_stays(made: Made, capsys: Capture, role: str) -> None:
    cells = {each.cell_id: each for each in made.cells}
    used = made.cell if role == "own" else cells[str(made.cell.baseline_cell_id)]
    folder = made.store / "artifacts" / used.artifact_id
    cut(folder / "levels.txt")
    with stores.holder(leases.of(made.store, "cells", made.cell.cell_id)):
        assert verb("fsck", made.store) == 1
        assert "a cell at work uses it" in capsys.readouterr().out
        assert folder.exists()
    assert verb("fsck", made.store) == 0
    assert not folder.exists()


def test_leases_of_the_dead_are_given_back(made: Made, capsys: Capture) -> None:
    dead = leases.of(made.store, "cells", "dead")
    alive = leases.of(made.store, "cells", "alive")
    released = leases.of(made.store, "cells", "released")
    with leases.held(released):
        pass
    stores.held_by_the_dead(dead)
    with stores.holder(alive):
        assert verb("fsck", made.store, "--dry-run") == 1
        assert capsys.readouterr().out.splitlines()[0].startswith("would be given back leases/")
        assert verb("fsck", made.store) == 0
        told = capsys.readouterr().out.splitlines()
        assert len(told) == 2
        assert told[0] == "given back leases/cells/dead: its owner ended"
        assert leases.owner(alive) is not None
    assert verb("fsck", made.store, "--dry-run") == 1  # now that one is dead too


def test_a_silent_owner_elsewhere_is_dead_and_a_beating_one_is_not(
    made: Made, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(leases.SECONDS, "2")
    stores.held_elsewhere(leases.of(made.store, "cells", "silent"))
    beating = stores.held_elsewhere(leases.of(made.store, "cells", "beating"))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            with beating.open("ab") as file:
                file.write(b".")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert verb("fsck", made.store) == 0
    finally:
        stop.set()
        thread.join()
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("2 leases are held on other machines")
    assert told[1] == "given back leases/cells/silent: its owner gave no sign of life"
    assert told[2].endswith(": 1 mended, 0 left")
    assert beating.read_text().startswith("{")


# --- the command ---------------------------------------------------------------------------------


def test_without_a_store_it_is_a_wrong_command(tmp_path: Path, capsys: Capture) -> None:
    assert verb("fsck", tmp_path) == 2
    assert "no store in" in capsys.readouterr().err
    assert verb("fsck", tmp_path, "--force") == 2
    assert "[--dry-run] [--full]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
