"""Slurm's commands: their output as it really is, and what is told when they fail."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from qgrid.slurm import client
from qgrid.slurm.client import Cluster, SlurmError, TaskState
from tests.slurm.cluster import Slurm

QUEUE = """\
12|0|RUNNING|n1|qgrid-a-001-builds|None
12|1|PENDING||qgrid-a-001-builds|Resources
13|N/A|COMPLETED|n[1-2]|other|None
14|3|PENDING||x|(ReqNodeNotAvail, UnavailableNodes:n1|n2)
broken line
"""
HISTORY = """\
12_0|COMPLETED|n1|qgrid-a-001-builds
12_1|CANCELLED by 1000|n2|qgrid-a-001-builds
12_[2-4,7%2]|CANCELLED by 0|None assigned|qgrid-a-001-builds
15|TIMEOUT|n3|other
"""
CONFIG = """\
Configuration data as of 2026-11-21T10:00:00
AccountingStorageType   = accounting_storage/slurmdbd
MaxArraySize            = 4001
MaxJobCount             = 10000
"""


def test_the_queue() -> None:
    found = client.parse_queue(QUEUE)
    assert found == [
        TaskState("12", 0, "RUNNING", "n1", "qgrid-a-001-builds", "None"),
        TaskState("12", 1, "PENDING", "", "qgrid-a-001-builds", "Resources"),
        TaskState("13", None, "COMPLETED", "n[1-2]", "other", "None"),
        TaskState("14", 3, "PENDING", "", "x", "(ReqNodeNotAvail, UnavailableNodes:n1|n2)"),
    ]
    assert [each.is_live for each in found] == [True, True, False, True]
    assert [each.label for each in found] == ["12_0", "12_1", "13", "14_3"]


def test_the_accounts() -> None:
    found = [(each.label, each.state) for each in client.parse_history(HISTORY)]
    cancelled = [(f"12_{index}", "CANCELLED") for index in (1, 2, 3, 4, 7)]
    assert found == [("12_0", "COMPLETED"), *cancelled, ("15", "TIMEOUT")]


def test_the_configuration() -> None:
    assert client.parse_config(CONFIG) == Cluster(4001, accounts=True)
    none = CONFIG.replace("accounting_storage/slurmdbd", "accounting_storage/none")
    assert client.parse_config(none) == Cluster(4001, accounts=False)
    assert client.parse_config("") == Cluster(1001, accounts=False)
    assert client.parse_config("MinJobAge               = 20 sec\n").memory_seconds == 20
    assert client.parse_config("MinJobAge               = 0 sec\n").memory_seconds == math.inf


@pytest.mark.parametrize("job", ["1; id", "--all", "1 2", "", "12_[0-3]", "*"])
def test_only_numbers_reach_the_commands(job: str) -> None:
    for act in (client.requeue, client.state, lambda each: client.cancel([each])):
        with pytest.raises(SlurmError, match="no number of a job"):
            act(job)


def test_a_machine_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"no `squeue`.*login node.*hydra/launcher=local"):
        client.queue()


def test_a_controller_that_is_away_is_silent(slurm: Slurm) -> None:
    assert client.queue() == []
    conf = Path(os.environ["SLURM_CONF"])
    lines = conf.read_text().splitlines()
    away = [line for line in lines if not line.startswith("SlurmctldPort=")]
    conf.write_text("\n".join([*away, "SlurmctldPort=9", "MessageTimeout=2", ""]))
    with pytest.raises(client.Silent, match="squeue"):
        client.queue()


def test_a_job_from_submission_to_its_end(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("#!/bin/bash\n#SBATCH --array=0-1\nsleep 60\n")
    job = client.submit("a.sh", tmp_path)
    own = [each for each in client.queue() if each.job == job]
    assert [(each.index, each.is_live) for each in own] == [(0, True), (1, True)]
    slurm.wait(lambda: client.state(f"{job}_0") == "RUNNING", "the first task")
    client.cancel([f"{job}_0"])
    slurm.wait(lambda: client.state(f"{job}_0") == "CANCELLED", "its end")
    states = {each.index: each.is_live for each in client.queue() if each.job == job}
    assert states == {0: False, 1: True}
    client.cancel([job])
    slurm.wait(lambda: client.state(f"{job}_1") == "CANCELLED", "the other's")
    client.cancel([job])  # once more does no harm


def test_what_the_cluster_is(slurm: Slurm) -> None:
    assert client.cluster() == Cluster(slurm.layout.max_array_size, accounts=False)


def test_a_refusal_is_one_sentence(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("#!/bin/bash\n#SBATCH --partition=nowhere\ntrue\n")
    with pytest.raises(SlurmError, match=r"`sbatch` failed: .*partition") as told:
        client.submit("a.sh", tmp_path)
    assert "\n" not in str(told.value)


def test_variables_of_the_user_change_nothing(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SQUEUE_STATES", "CANCELLED")
    (tmp_path / "a.sh").write_text("#!/bin/bash\ntrue\n")
    job = client.submit("a.sh", tmp_path)
    assert job in {each.job for each in client.queue()}
