"""Sweeps and verbs as a user types them, in processes of their own, and what records come to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qgrid.store import records
from tests.drills import running, same, trivial
from tests.stores import Made

GRID = [
    "method=trivial",
    "model=trivial",
    f"model.id={trivial.MODEL.id}",
    "runtime=trivial",
    "slices=trivial",
    "workload=trivial",
    "context=32",
    "tracking=none",
]


def finished(made: Made) -> dict[str, bytes]:
    """The bytes of every record, each of which can be read."""
    found = records.read_all(made.store, made.cells)
    return {name: records.path(made.store, name).read_bytes() for name in found}


def numbers(made: Made) -> dict[tuple[str, str, str | None], float]:
    """What was measured, but for what hangs on the moment."""
    return {
        (record.cell_id, each.metric, each.slice): each.value
        for record in records.read_all(made.store, made.cells).values()
        for each in record.measurements
        if each.metric not in same.MOMENTARY_METRICS
    }


def launched(made: Made, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Go on with a sweep, as a user does."""
    return qgrid(["resume", made.folder.name, f"out={made.store}"], cwd)


def qgrid(
    words: list[str], cwd: Path, conf: Path = trivial.CONF, as_nobody: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; as somebody whom the modes of files bind."""
    command = [sys.executable, "-m", "qgrid", *words]
    if GRID[0] in words:
        command += ["--config-dir", str(conf)]
    if as_nobody and os.geteuid() == 0:
        command = [*unprivileged(), *command]
    return subprocess.run(
        command,
        cwd=cwd,
        env=trivial.variables(),
        capture_output=True,
        text=True,
        timeout=running.SECONDS,
    )


def unprivileged() -> list[str]:
    """What runs a command as root without root's right to read everything."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to give up the right to read everything")
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]


def traceless(ended: subprocess.CompletedProcess[str]) -> str:
    """What a command printed, which is no traceback."""
    text = ended.stdout + ended.stderr
    assert "Traceback" not in text, text
    return text
