"""The text that sbatch gets: golden files, and names that try to become commands."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid.slurm import script
from qgrid.slurm.options import Options
from qgrid.slurm.script import Job, Resources, UnsafeValue

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm"
PLAIN = Job("0123456789ab", "001-builds", 3, Resources("gpu:l4:1", None, 4, None, 60), ())
FULL = Job(
    "0123456789ab",
    "004-cells",
    1000,
    Resources("gpu:h100:4", "(nvlink|sxm)&rack1", 16, 128, 2880),
    ("17", "18"),
)
EVERYTHING = Options(
    account="proj-1",
    partition="gpu,spare",
    qos="high",
    exclusive=True,
    throttle=20,
    requeue=False,
    warn_seconds=300,
    setup=("module load cuda/13.0", 'source "$HOME/env.sh"  # the user\'s own'),
    extra=("reservation=night", "exclude=n[1-3]", "contiguous", "nice=5"),
)
HOSTILE = [
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "a\ntouch pwned\n",
    "a\n#SBATCH --wrap=true",
    "-rf",
    "%A_%a%%",
    "#SBATCH --uid=0",
    "a\\",
    "~root",
    "*",
    "\x1b[2J",
    "ünï",
]


def rendered(
    job: Job, options: Options, python: str = "/opt/python", folder: str = "/home/u"
) -> str:
    return script.render(job, options, python, folder)


@pytest.mark.parametrize(
    ("name", "job", "options"), [("plain", PLAIN, Options()), ("full", FULL, EVERYTHING)]
)
def test_the_golden_scripts(name: str, job: Job, options: Options) -> None:
    assert rendered(job, options) == (GOLDEN / f"{name}.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_paths_stay_what_they_are(text: str, tmp_path: Path) -> None:
    """The script runs in a shell: one program with the arguments meant for it, nothing else."""
    python = tmp_path / "bin" / text
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$PWD" "$@" > "$QGRID_SAID"\n')
    python.chmod(stat.S_IRWXU)
    launch, folder = tmp_path / f"launch {text}", tmp_path / f"start{text}"
    launch.mkdir()
    folder.mkdir()
    body = rendered(PLAIN, Options(), str(python), str(folder))
    said = tmp_path / "said"
    variables = {**os.environ, "QGRID_SAID": str(said), "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(["/bin/bash", "-c", body], cwd=launch, env=variables, check=True)
    assert said.read_text().split("\0")[:-1] == [
        str(folder),
        "-m",
        "qgrid.slurm.task",
        f"{launch}/001-builds.json",
        "2",
    ]
    assert not list(tmp_path.rglob("pwned"))
    assert _directives(body) == _directives(rendered(PLAIN, Options()))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("field", ["gres", "constraint"])
def test_no_hostile_word_in_a_line_for_sbatch(text: str, field: str) -> None:
    both: dict[str, Any] = {field: text}
    asked = replace(PLAIN.resources, **both)
    refused = not all(c.isalnum() or c in "_%*-" for c in text) or not text.isascii()
    if refused:
        with pytest.raises(UnsafeValue, match=field):
            rendered(replace(PLAIN, resources=asked), Options())
    else:
        body = rendered(replace(PLAIN, resources=asked), Options())
        assert f"#SBATCH --{field}={text}\n" in body


def test_lines_for_sbatch_come_before_all_else() -> None:
    lines = rendered(FULL, EVERYTHING).splitlines()
    kinds = [line.startswith("#SBATCH ") for line in lines[1:]]
    assert kinds == sorted(kinds, reverse=True)
    assert "touch" not in rendered(FULL, EVERYTHING)


def test_a_launch_folder_that_a_node_lacks_is_done_without(tmp_path: Path) -> None:
    body = rendered(PLAIN, Options(), "/bin/pwd", str(tmp_path / "gone"))
    body = body.replace(" -m qgrid.slurm.task", "").replace(' "$qgrid_tasks"', "")
    body = body.replace(' "$SLURM_ARRAY_TASK_ID"', "")
    done = subprocess.run(["bash", "-c", body], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path)


@pytest.mark.parametrize(("lines", "runs"), [(("false",), False), (("false || true", "X=1"), True)])
def test_a_set_up_line_that_fails_ends_the_script(
    lines: tuple[str, ...], runs: bool, tmp_path: Path
) -> None:
    body = rendered(PLAIN, Options(setup=lines), "/bin/echo", str(tmp_path))
    variables = {**os.environ, "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(
        ["bash", "-c", body], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert (done.returncode == 0) == runs
    assert ("qgrid.slurm.task" in done.stdout) == runs


@pytest.mark.parametrize(("wanted", "warned"), [(20, 20), (120, 50)])
def test_the_warning_comes_after_the_begin_of_a_short_task(wanted: int, warned: int) -> None:
    short = replace(PLAIN, resources=replace(PLAIN.resources, minutes=1))
    body = rendered(short, Options(warn_seconds=wanted))
    assert f"#SBATCH --signal=B:USR1@{warned}\n" in body


def _directives(body: str) -> list[str]:
    """The lines that sbatch reads: those before the first command, as its manual says."""
    found = []
    for line in body.splitlines()[1:]:
        if not line.startswith("#"):
            break
        found.append(line)
    return [shlex.join(shlex.split(line)) for line in found]
