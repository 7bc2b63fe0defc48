"""Grids through a real Slurm of three nodes with two kinds of cards, from the command line on."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qgrid import codec, launchers, sweep
from qgrid.slurm import submissions
from qgrid.store import records
from qgrid.types import Gpu, Method, PlannedCell, Runtime
from tests.drills import same, trivial
from tests.drills.running import finish as finish_here
from tests.slurm import grids
from tests.slurm.cluster import NODES, Layout, Slurm

pytestmark = pytest.mark.slow

KINDS = {node.name: node.gpu for node in NODES}


def own_conf(folder: Path, *gpus: Gpu) -> Path:
    """A user's own configuration: trivial cells and these cards."""
    shutil.copytree(trivial.CONF, folder)
    (folder / "gpu").mkdir()
    for gpu in gpus:
        (folder / "gpu" / f"{gpu.name}.yaml").write_text(yaml.safe_dump(codec.plain(gpu)))
    return folder


def test_a_mixed_grid_from_the_command_line(slurm: Slurm, tmp_path: Path) -> None:
    gpus = [
        grids.here("alpha"),
        grids.here("beta"),
        grids.card("alpha", constraint="big"),
        grids.card("beta", count=2),
    ]
    conf, store = own_conf(tmp_path / "conf", *gpus), tmp_path / "out"
    words = [
        f"--config-dir={conf}", "hydra/launcher=slurm", "hydra.launcher.poll_seconds=0.2",
        "hydra.launcher.memory_gib=1", "model=trivial", f"model.id={trivial.MODEL.id}",
        "method=trivial", "bits=16,8,4", "runtime=trivial", "slices=trivial", "workload=trivial",
        f"gpu={','.join(gpu.name for gpu in gpus)}", "context=32", "tracking=none", "name=mixed",
    ]  # fmt: skip

    with grids.qgrid(slurm, store, "-m", *words) as running:
        code = grids.finish(running, slurm)

    assert code == 0, running.log.read_text()
    folder = store / "sweeps" / "mixed"
    cells = sweep.read_plan(folder / "plan.jsonl")
    assert len(cells) == 12
    _assert_complete_or_wrong_device(store, cells)
    assert len({each.artifact_id for each in cells}) == 3
    assert len(grids.begins(store, "artifact")) == 3  # each quantized once
    kinds = {codec.digest(each.cell): each.cell.gpu for each in cells}
    timings = grids.begins(store, "speed")
    assert Counter(line["cell"] for line in timings) == Counter(
        {cell: 1 for cell, gpu in kinds.items() if gpu.kind == "cpu"}
    )
    for line in timings:
        assert KINDS[line["node"]] == kinds[line["cell"]].gres
    _assert_given_as_asked(slurm, folder, cells)


def _assert_given_as_asked(slurm: Slurm, folder: Path, cells: list[PlannedCell]) -> None:
    """What Slurm itself says it gave to the task of each cell."""
    gpus = {each.cell_id: each.cell.gpu for each in cells}
    given = {(job.get("ArrayJobId"), job.get("ArrayTaskId")): job for job in slurm.jobs()}
    seen: list[str] = []
    for array in submissions.read(folder):
        for index, task in enumerate(array.tasks):
            job = given[array.job, str(index)]
            for gpu in (gpus[cell_id] for cell_id in task.cells):
                assert job["TresPerNode"] == f"gres:gpu:{gpu.gres}:{gpu.count}"
                assert KINDS[job["NodeList"]] == gpu.gres
                if gpu.constraint is not None:
                    assert job["NodeList"] == "n1"  # the only one that is big
            seen += task.cells
    assert sorted(seen) == sorted(gpus)


def _assert_complete_or_wrong_device(store: Path, cells: list[PlannedCell]) -> None:
    for each in cells:
        record = records.read(store, each.cell_id)
        assert record is not None
        if each.cell.gpu.kind == "cuda":
            assert record.status == "wrong_device"
            assert record.measurements == ()
        else:
            assert record.status == "ok", record.error
            metrics = {m.metric for m in record.measurements}
            assert metrics >= {"ppl", "accuracy", "decode_throughput", "ttft_ms"}


def test_records_are_those_of_the_local_launcher(slurm: Slurm, tmp_path: Path) -> None:
    choices = [*grids.axis(grids.here("alpha")), *grids.axis(grids.here("beta"), (8, 4))]
    here, _ = trivial.write(choices, tmp_path / "here")
    there, cells = trivial.write(choices, tmp_path / "there")
    assert finish_here(here) == 0
    with grids.launching(there, slurm) as running:
        assert grids.finish(running, slurm) == 0, running.log.read_text()
    assert not same.differences(cells, tmp_path / "here", tmp_path / "there")


def test_a_cell_that_fails_costs_its_own_record_and_the_exit_code(
    slurm: Slurm, tmp_path: Path
) -> None:
    good = grids.axis(grids.here("beta"))
    bad = replace(
        good[0],
        method=Method("faulty", {"act": "raise"}),
        runtime=Runtime("light", "float32", "bfloat16", 1, {"quality": "work", "speed": "work"}),
    )
    folder, cells = trivial.write([*good, bad], tmp_path / "out")
    with grids.launching(folder, slurm) as running:
        assert grids.finish(running, slurm) == 1
    status = {each.cell.method.name: set() for each in cells}  # type: dict[str, set[str]]
    for each, found in zip(cells, grids.statuses(tmp_path / "out", cells), strict=True):
        status[each.cell.method.name].add(found)
    assert status["trivial"] == {"ok"}
    assert "crashed" in status["faulty"]
    assert "crashed" in running.log.read_text()


@pytest.mark.parametrize("layout", [Layout(max_array_size=4)])
def test_more_tasks_than_an_array_may_have(slurm: Slurm, tmp_path: Path) -> None:
    gpu = grids.here("alpha")
    choices = [trivial.choice(8, number=number, gpu=gpu) for number in range(5)]
    folder, cells = trivial.write(choices, tmp_path / "out")
    with grids.launching(folder, slurm, cells_per_task=1) as running:
        assert grids.finish(running, slurm) == 0, running.log.read_text()
    assert grids.statuses(tmp_path / "out", cells) == ["ok"] * len(cells)
    arrays = Counter(job["ArrayJobId"] for job in slurm.jobs() if "ArrayJobId" in job)
    assert max(arrays.values()) <= 4
    assert len(arrays) >= 3


def test_detached_then_watched(slurm: Slurm, tmp_path: Path) -> None:
    store = tmp_path / "out"
    folder, cells = trivial.write(grids.axis(grids.here("beta"), (16, 8)), store)
    with (
        grids.gate(store, cells[0]) as gate,
        grids.launching(folder, slurm, detach=True) as detached,
    ):
        assert detached.wait() == 0
        slurm.wait(lambda: grids.begins(store, "speed"), "a timing")
        assert grids.statuses(store, cells) == ["none", "none"]
        with grids.qgrid(slurm, store, "status") as status:
            assert status.wait() == 0
        said = status.log.read_text()
        assert "1 running" in said
        assert "1 queued (Dependency" in said
        with grids.qgrid(slurm, store, "resume", folder.name) as resumed:
            slurm.wait(lambda: "2 queued already" in resumed.log.read_text(), "the second launcher")
            gate.unlink()
            assert grids.finish(resumed, slurm) == 0, resumed.log.read_text()
    assert grids.statuses(store, cells) == ["ok", "ok"]
    assert len(grids.begins(store, "speed")) == 2
    assert launchers.chosen(folder).name == "slurm"
