"""The cluster that the other tests use is one: its nodes differ, die alone, and leave nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import faults
from tests.slurm import cluster
from tests.slurm.cluster import Layout, Slurm


def submit(slurm: Slurm, folder: Path, line: str, *arguments: str) -> str:
    """The number of a job of one shell line."""
    own = ("--parsable", "--output=%j.txt", "--open-mode=append", f"--wrap={line}")
    return slurm.run("sbatch", *arguments, *own, cwd=folder).strip()


def test_a_job_runs_where_its_card_is(slurm: Slurm, tmp_path: Path) -> None:
    line = "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    job = submit(slurm, tmp_path, line, "--gres=gpu:beta:2")
    slurm.wait_empty()
    assert (tmp_path / f"{job}.txt").read_text().split() == ["n3", "0,1"]
    assert [(each["NodeList"], each["JobState"]) for each in slurm.jobs()] == [("n3", "COMPLETED")]


def test_a_lost_node_takes_all_its_processes_with_it(slurm: Slurm, tmp_path: Path) -> None:
    line = "(setsid sleep 600 &); echo begun; sleep 600"
    job = submit(slurm, tmp_path, line, "--gres=gpu:beta:1")
    other = submit(slurm, tmp_path, line, "--gres=gpu:alpha:1")
    for each in (job, other):
        slurm.wait((tmp_path / f"{each}.txt").exists, "the job")
    pids = [*slurm.daemons("n3"), *slurm.tasks("n3")]
    assert len(pids) >= 4
    slurm.lose("n3")
    faults.wait_for(lambda: not any(map(faults.is_alive, pids)), "the end of the node")
    assert [*slurm.tasks("n1"), *slurm.tasks("n2")]


def test_nothing_is_left_of_a_cluster(tmp_path: Path) -> None:
    if cluster.missing():
        pytest.skip(str(cluster.missing()))
    with pytest.raises(ZeroDivisionError), cluster.running(Layout()) as slurm:
        submit(slurm, tmp_path, "(setsid sleep 600 &); sleep 600", "--array=0-7")
        slurm.wait(lambda: slurm.tasks("n1"), "tasks")
        pids = slurm.processes()
        raise ZeroDivisionError
    assert len(pids) > 8
    assert not any(map(faults.is_alive, pids))
    assert not slurm.folder.exists()
