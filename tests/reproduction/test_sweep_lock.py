"""`sweep.lock.yaml`: whole, stable, fit to be committed, and read strictly."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qgrid import codec, registry, sweep
from qgrid.envs import locks as environments
from qgrid.reproduction import parts, sweep_lock
from qgrid.store import records
from qgrid.types import Record
from tests import locks
from tests.locks import Project


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locks.install(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A sweep of three cells that was run."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        locks.install(patch, root)
        yield locks.run(root / "project")
    registry.names.cache_clear()


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of it that a test may spoil; its plan and lock name the first one's files."""
    return finished.copied(tmp_path / "project")


def results(project: Project) -> list[Record]:
    planned = sweep.read_plan(project.sweep / "plan.jsonl")
    return list(records.read_all(project.out, planned).values())


def write(project: Project, found: list[Record]) -> str:
    planned = sweep.read_plan(project.sweep / "plan.jsonl")
    return sweep_lock.write(project.sweep, planned, found).read_text()


def test_a_sweep_leaves_a_lock_of_its_cells_with_every_number(finished: Project) -> None:
    data = yaml.safe_load(finished.lock.read_text())
    planned = sweep.read_plan(finished.sweep / "plan.jsonl")
    assert data["schema"] == "qgrid.lock/1"
    assert list(data["cells"]) == [each.cell_id for each in planned]
    assert len(planned) == 3
    for record in results(finished):
        cell = data["cells"][record.cell_id]
        assert cell["status"] == record.status == "ok"
        assert cell["measurements"] == [
            [m.metric, m.slice, m.value, m.low, m.high, m.n] for m in record.measurements
        ]
        artifact = data["artifacts"][record.artifact_id]
        assert artifact["files"] == record.artifact["files"]
        assert (
            data["environments"][cell["environment"]]["versions"] == record.environment["versions"]
        )
        assert data["qualities"][record.quality_id]["colours"]["n"] == 8


def test_the_cells_of_a_lock_are_those_of_the_plan(finished: Project) -> None:
    lock = sweep_lock.read(finished.lock)
    planned = sweep.read_plan(finished.sweep / "plan.jsonl")
    whole = parts.placed(lock.parts, [finished.root])
    for each in planned:
        locked = lock.cells[each.cell_id]
        assert parts.put_together(whole, locked.cell) == each.cell
        assert (locked.artifact_id, locked.quality_id) == (each.artifact_id, each.quality_id)
        assert (locked.baseline_cell_id, locked.added) == (each.baseline_cell_id, each.added)


def test_inputs_are_the_hashes_of_their_files(finished: Project) -> None:
    def sha256(name: str) -> str:
        return hashlib.sha256((finished.root / name).read_bytes()).hexdigest()

    inputs = yaml.safe_load(finished.lock.read_text())["inputs"]
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    assert inputs["models"] == {"mine": {name: sha256(f"models/mine/{name}") for name in names}}
    assert inputs["slices"] == {
        "own": {"items.colours": sha256("data/colours.jsonl"), "prose": sha256("data/prose.txt")}
    }
    pins = yaml.safe_load(finished.lock.read_text())["pins"]
    assert pins == {"main": dict(environments.pins("main", "cpu"))}


def test_the_same_records_give_the_same_bytes_in_any_order(finished: Project) -> None:
    before = finished.lock.read_bytes()
    found = results(finished)
    for order in (found, found[::-1]):
        assert write(finished, order).encode() == before
    changed = replace(found[0], status="oom")
    assert write(finished, [changed, *found[1:]]).encode() != before
    write(finished, found)


def test_what_is_read_is_what_was_written(finished: Project) -> None:
    planned = sweep.read_plan(finished.sweep / "plan.jsonl")
    assert sweep_lock.read(finished.lock) == sweep_lock.build(
        finished.sweep, planned, results(finished)
    )


def test_it_names_no_host_no_folder_and_no_secret(
    project: Project, finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_TOKEN", "correct-horse-battery")
    words = ["-m", f"out={project.out}", "x=correct-horse-battery", "bits=4,8"]
    sweep_lock.keep_command(project.sweep, words)
    found = [
        replace(each, environment={**each.environment, "host": "some-node-17"})
        for each in results(project)
    ]
    text = write(project, found)
    assert "some-node-17" not in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(project.root) not in text
    assert "correct-horse" not in text
    assert yaml.safe_load(text)["command"] == ["-m", "out=./outputs", "x=[redacted]", "bits=4,8"]
    own = finished.lock.read_text()
    assert str(finished.root) not in own
    assert str(Path.home()) + os.sep not in own


def test_an_interrupted_sweep_is_locked_as_far_as_it_came(project: Project) -> None:
    found = results(project)
    write(project, found[:1])
    lock = sweep_lock.read(project.lock)
    assert [each.status for each in lock.cells.values()].count("ok") == 1
    assert [each.status for each in lock.cells.values()].count(None) == 2
    assert list(lock.qualities) == [found[0].quality_id]
    assert write(project, []) == write(project, [])


def test_inputs_altered_since_the_plan_are_told(tmp_path: Path) -> None:
    project, planned = locks.planned(tmp_path / "project")
    assert sweep_lock.build(project.sweep, planned, []).changed == ()
    with (project.root / "data" / "colours.jsonl").open("a") as file:
        file.write("\n")
    assert set(sweep_lock.build(project.sweep, planned, []).changed) == {
        each.cell_id for each in planned
    }
    (project.root / "data" / "colours.jsonl").unlink()
    lock = sweep_lock.build(project.sweep, planned, [])
    assert len(lock.changed) == len(planned)
    assert lock.inputs.slices["own"]["items.colours"] is None


def test_torn_items_do_not_keep_a_lock_from_being_written(project: Project) -> None:
    found = results(project)
    (project.out / "quality" / found[0].quality_id / "items.jsonl").write_text('{"sli')
    write(project, found)
    assert found[0].quality_id not in sweep_lock.read(project.lock).qualities


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(schema="qgrid.lock/9"), "qgrid.lock/9"),
        (lambda data: data.update(extra=1), "`extra` is not a known key"),
        (lambda data: data.pop("cells"), "`cells` is missing"),
        (lambda data: data.update(name="../../etc"), "`name="),
        (lambda data: data["parts"].update(methods={}), "'trivial', which is not among"),
        (lambda data: data["limits"].update(speed="fast"), "limits.speed"),
        (lambda data: next(iter(data["cells"].values())).update(bits="4"), "bits"),
    ],
)
def test_a_lock_that_does_not_follow_the_schema_is_refused(
    project: Project, change: Any, words: str
) -> None:
    data = yaml.safe_load(project.lock.read_text())
    change(data)
    project.lock.write_text(yaml.safe_dump(data))
    with pytest.raises(sweep_lock.UnreadableLock) as error:
        sweep_lock.read(project.lock)
    assert words in str(error.value)
    assert str(project.lock) in str(error.value)


def test_a_lock_that_is_not_there_or_no_yaml_is_one_sentence(project: Project) -> None:
    project.lock.write_text("a: [")
    with pytest.raises(sweep_lock.UnreadableLock, match="not YAML"):
        sweep_lock.read(project.lock)
    project.lock.unlink()
    with pytest.raises(FileNotFoundError, match="every sweep writes"):
        sweep_lock.read(project.lock)


def test_numbers_of_records_survive_to_the_last_digit(project: Project) -> None:
    found = results(project)
    values = [1e-05, 7.756814617666696e-05, 1e22, 0.1 + 0.2, -0.0, 2.0]
    odd = tuple(
        replace(found[0].measurements[0], slice=f"s{n}", value=value)
        for n, value in enumerate(values)
    )
    write(project, [replace(found[0], measurements=odd)])
    cell = sweep_lock.read(project.lock).cells[found[0].cell_id]
    assert [row.value.hex() for row in cell.measurements] == [value.hex() for value in values]
    assert codec.dumps(odd[0])  # a record could hold them
