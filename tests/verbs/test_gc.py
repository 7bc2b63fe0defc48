"""Freed is what no record and no unfinished plan needs, and nothing else, whoever is at work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qgrid import codec
from qgrid.files import write_atomic
from qgrid.store import leases, needs, records
from qgrid.types import PlannedCell
from qgrid.verbs import gc
from tests import stores
from tests.stores import Made, verb

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return stores.original(tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    stores.install(monkeypatch, tmp_path / "tmp")
    return original.copy(tmp_path / "store")


def artifacts(made: Made) -> set[str]:
    return {path.name for path in (made.store / "artifacts").iterdir()}


def of_bits(made: Made, bits: int) -> list[PlannedCell]:
    return [each for each in made.cells if each.cell.bits == bits]


def forget(made: Made, *cells: PlannedCell, plan: bool = True) -> None:
    """Remove the records of cells, and the lines of the plan (or mark them as refused there)."""
    for cell in cells:
        records.path(made.store, cell.cell_id).unlink()
    if plan:
        rewrite_plan(made, [each for each in made.cells if each not in cells])


def rewrite_plan(made: Made, cells: list[PlannedCell]) -> None:
    text = "".join(f"{codec.dumps(each)}\n" for each in cells)
    write_atomic(made.folder / "plan.jsonl", text)


def rewrite_record(made: Made, cell: PlannedCell, status: str) -> None:
    file = records.path(made.store, cell.cell_id)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": status}))


def test_what_records_stand_on_stays(made: Made, capsys: Capture) -> None:
    before = stores.contents(made.store)
    assert verb("gc", made.store) == 0
    assert capsys.readouterr().out == "freed 0 artifacts, 0 bytes; 3 are needed\n"
    assert stores.contents(made.store) == before


def test_what_nobody_needs_is_freed_and_its_size_told(made: Made, capsys: Capture) -> None:
    cells = of_bits(made, 4)
    forget(made, *cells)
    freed = cells[0].artifact_id
    (made.store / "artifacts" / freed / "big.bin").write_bytes(bytes(3 << 20))
    (made.store / "artifacts" / freed / "linked").symlink_to(made.record)  # of a base model: free
    before = stores.contents(made.store)

    assert verb("gc", made.store, "--dry-run") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"would free {freed}, 3.0 MiB"
    assert told[1] == "would free 1 artifacts, 3.0 MiB; 2 are needed"
    assert stores.contents(made.store) == before

    assert verb("gc", made.store) == 0
    assert capsys.readouterr().out == "\n".join(told).replace("would free", "freed") + "\n"
    after = stores.contents(made.store)
    gone = {key for key in before if freed in Path(key).parts[1:2]}
    assert {Path(key).parts[0] for key in gone} == {"artifacts", "builds"}
    assert after == {key: value for key, value in before.items() if key not in gone}
    assert made.record.exists()


def test_a_record_keeps_its_artifact_and_its_baseline_s(made: Made) -> None:
    """Also without any plan."""
    forget(made, *of_bits(made, 16), *of_bits(made, 4))
    rewrite_plan(made, [])
    assert verb("gc", made.store) == 0
    assert artifacts(made) == {made.cell.artifact_id, of_bits(made, 16)[0].artifact_id}


@pytest.mark.parametrize(
    ("status", "keeps"),
    [
        ("ok", True),
        ("oom", True),
        ("crashed", True),
        ("wrong_device", True),
        ("unsupported", False),
        ("does_not_fit", False),
    ],
)
def test_a_record_of_a_cell_that_never_ran_keeps_nothing(
    made: Made, status: str, keeps: bool
) -> None:
    cells = of_bits(made, 4)
    for cell in cells:
        rewrite_record(made, cell, status)
    rewrite_plan(made, [each for each in made.cells if each not in cells])
    assert verb("gc", made.store) == 0
    assert (cells[0].artifact_id in artifacts(made)) == keeps


def test_an_unfinished_plan_keeps_its_artifacts_and_baselines(made: Made) -> None:
    forget(made, *made.cells, plan=False)
    rewrite_plan(made, [each for each in made.cells if each.cell.bits != 4])
    assert verb("gc", made.store) == 0
    kept = {each.artifact_id for each in made.cells if each.cell.bits != 4}
    assert artifacts(made) == kept
    refused = [replace(each, status="unsupported", reason="why") for each in made.cells]
    rewrite_plan(made, refused)
    assert verb("gc", made.store) == 0
    assert artifacts(made) == set()


def test_a_plan_keeps_what_an_older_one_refused(made: Made) -> None:
    cells = of_bits(made, 4)
    for cell in cells:
        rewrite_record(made, cell, "does_not_fit")
    assert verb("gc", made.store) == 0
    assert cells[0].artifact_id in artifacts(made)


def test_a_freed_artifact_is_built_again_when_it_is_needed(made: Made) -> None:
    forget(made, *of_bits(made, 4))
    assert verb("gc", made.store) == 0
    assert len(artifacts(made)) == 2
    rewrite_plan(made, list(made.cells))
    assert made.finish() == 0
    assert len(artifacts(made)) == 3
    assert made.statuses() == {"ok"}


# --- who is at work ------------------------------------------------------------------------------


def test_under_a_living_lease_nothing_is_freed(made: Made, capsys: Capture) -> None:
    cells = of_bits(made, 4)
    forget(made, *cells)
    lease = leases.of(made.store, "artifacts", cells[0].artifact_id)
    with stores.holder(lease):
        for flags in ((), ("--dry-run",)):
            assert verb("gc", made.store, *flags) == 0
            told = capsys.readouterr().out.splitlines()
            assert told[0].startswith(f"kept {cells[0].artifact_id}, ")
            assert told[0].endswith(": it is being built")
            assert "0 artifacts" in told[1]
    assert cells[0].artifact_id in artifacts(made)
    assert verb("gc", made.store) == 0  # the owner is dead
    assert cells[0].artifact_id not in artifacts(made)


def test_a_sweep_that_is_planned_meanwhile_keeps_its_artifacts(
    made: Made, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = of_bits(made, 4)
    forget(made, *cells)
    real = leases.attempt

    def planned_meanwhile(folder: Path) -> leases.Lease | None:
        rewrite_plan(made, list(made.cells))
        return real(folder)

    monkeypatch.setattr(gc, "leases", SimpleNamespace(of=leases.of, attempt=planned_meanwhile))
    assert verb("gc", made.store) == 0
    assert "sweep trivial needs it" in capsys.readouterr().out
    assert len(artifacts(made)) == 3


def test_an_interrupted_gc_leaves_no_half_artifact(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = of_bits(made, 4)
    forget(made, *cells)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        assert verb("gc", made.store) == 130
    assert cells[0].artifact_id not in artifacts(made)
    assert verb("fsck", made.store) == 0
    assert all(not name.startswith(".") for name in artifacts(made))
    assert len(artifacts(made)) == 2


# --- what cannot be told -------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["record", "plan"])
def test_nothing_is_freed_while_something_cannot_be_read(
    made: Made, capsys: Capture, broken: str
) -> None:
    forget(made, *of_bits(made, 4))
    file = made.record if broken == "record" else made.folder / "plan.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    before = stores.contents(made.store)
    assert verb("gc", made.store) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"nothing was freed: {file} cannot be read; `python -m qgrid fsck`")
    assert stores.contents(made.store) == before


def test_a_record_of_another_version_keeps_its_artifact(made: Made) -> None:
    for cell in of_bits(made, 4):
        file = records.path(made.store, cell.cell_id)
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | {"schema": "qgrid.record/99", "measurements": "none"}))
    rewrite_plan(made, [])
    assert verb("gc", made.store) == 0
    assert len(artifacts(made)) == 3


def test_needs_are_told_by_name(made: Made) -> None:
    forget(made, *of_bits(made, 4), plan=False)
    by = needs.artifacts(made.store)
    assert by[of_bits(made, 4)[0].artifact_id] == "sweep trivial"
    assert by[of_bits(made, 8)[0].artifact_id].startswith("cell ")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (140 * 2**30, "140.0 GiB"),
        (2048 * 2**30, "2048.0 GiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert gc.shown(size) == text
