"""The command line: wrong commands end in one sentence and code 2; own files are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def qgrid(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qgrid", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | env,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method=gptqq"], ["gptqq", "gptq", "awq"]),
        (["bitz=4"], ["bitz"]),
        (["-m", "method=rtn,gptq", "bits=four"], ["bits=four", "whole number"]),
        (["method=rtn", "method.group_sise=64"], ["group_sise"]),
        (["method=rtn", "method.group_size=x"], ["method.group_size", "x", "integer"]),
        (["method=nf4", "bits=8"], ["empty", "nf4", "bits=8", "has: 4"]),
        (["method=rtn", "method.scheme=W4A16", "bits=8"], ["disagree", "bits=8"]),
        (["out=a,b"], ["out", "cannot be swept"]),
        (["+sweeps=nothing"], ["nothing"]),
        (["model=hf"], ["model.id"]),
        (["model=hf", "model.id=./nowhere"], ["nowhere", "folder"]),
        (["slices.items.code.path=gone.jsonl"], ["gone.jsonl"]),
        (["report"], ["no sweep"]),
        (["plan", "method=rtn", "kv_cache=int3"], ["int3", "auto16"]),
    ],
)
def test_a_wrong_command_is_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    done = qgrid(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "outputs" / "sweeps").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["report", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from qgrid.__main__ import main; code = main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'wandb', 'numpy', 'hydra'} & set(sys.modules); "
        "assert code == 0 and not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "method=" in done.stdout


def test_cfg_shows_a_configuration(tmp_path: Path) -> None:
    done = qgrid("--cfg", "job", "method=nf4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "name: nf4" in done.stdout


def test_plan_of_a_committed_grid_with_an_override(tmp_path: Path) -> None:
    done = qgrid("plan", "+sweeps=demo", "bits=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("6 cells: 5 run, 1 unsupported")


def test_a_key_that_only_the_swept_choices_have(tmp_path: Path) -> None:
    done = qgrid("plan", "-m", "method=rtn,gptq", "method.group_size=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 cells: 3 run (1 baseline added)")


def test_a_committed_grid_begins_with_its_command() -> None:
    for file in (ROOT / "sweeps").glob("*.yaml"):
        header, command = file.read_text().splitlines()[:2]
        assert header == "# @package _global_"  # Hydra reads it on the first line only
        assert command == f"# python -m qgrid +sweeps={file.stem}"


def test_doctor_names_every_method(tmp_path: Path) -> None:
    done = qgrid("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("none", "rtn", "gptq", "awq", "nf4", "int8", "transformers"):
        assert name in done.stdout


def test_own_yaml_and_own_method_are_planned(tmp_path: Path) -> None:
    own = own_folder(tmp_path)
    done = qgrid(
        "plan",
        "--config-dir",
        str(own),
        "gpu=b200",
        "method=mine",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 cells: 2 run (1 baseline added)")


def own_folder(tmp_path: Path) -> Path:
    """A user's repository: a GPU and slices as YAML, a method and a runtime by entry points."""
    own = tmp_path / "own"
    for group, name, text in [
        (
            "gpu",
            "b200",
            "name: b200\nkind: cuda\nmatch: B200\ncapability: sm_100\n"
            "memory_gib: 180\nbandwidth_gb_s: 8000\ncount: 1\n",
        ),
        (
            "slices",
            "mine",
            "name: mine\nprose: null\nitems:\n  tickets: {path: tickets.jsonl, "
            "scoring: choice, chat: true, limit: null, max_new_tokens: 8}\n",
        ),
        ("method", "mine", (ROOT / "conf/method/rtn.yaml").read_text().replace("rtn", "mine", 1)),
        (
            "runtime",
            "theirs",
            (ROOT / "conf/runtime/transformers.yaml")
            .read_text()
            .replace("name: transformers", "name: theirs"),
        ),
    ]:
        (own / group).mkdir(parents=True, exist_ok=True)
        (own / group / f"{name}.yaml").write_text(text)
    items = [
        {"id": f"t{i}", "level": 1, "prompt": f"{i}+1=", "choices": ["0", str(i)], "answer": "0"}
        for i in range(1, 9)
    ]
    (own / "tickets.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    site = tmp_path / "site"
    (site / "theirs-1.0.dist-info").mkdir(parents=True)
    (site / "theirs-1.0.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 1.0\n")
    (site / "theirs-1.0.dist-info" / "entry_points.txt").write_text(
        "[qgrid.methods]\nmine = their_method\n[qgrid.runtimes]\ntheirs = their_runtime\n"
    )
    (site / "their_method.py").write_text(
        "from qgrid.methods.rtn import *\n"
        "from qgrid.methods.rtn import SUPPORTS, Options, quantize\n"
    )
    (site / "their_runtime.py").write_text(
        "from qgrid.runtimes.transformers import LOADS, Options, load\n"
    )
    return own


@pytest.mark.slow
def test_own_method_runtime_and_slices_run(tmp_path: Path) -> None:
    own = own_folder(tmp_path)
    done = qgrid(
        "--config-dir", str(own), "method=mine", "bits=8", "runtime=theirs", "slices=mine",
        "tracking=none", "workload.repeats=2", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tickets" in done.stdout
