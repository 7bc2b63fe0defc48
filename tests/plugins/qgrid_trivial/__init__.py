"""Cells that take milliseconds on the real paths, with numbers that depend on the cell alone.

For tests of what happens around cells: their stages are real processes that build, check, score
and time, but nothing of it needs torch (`stand_ins/` takes its place in these processes).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

LEDGER = "QGRID_TRIVIAL_LEDGER"  # environment variable: a file that every stage adds lines to
GATES = "QGRID_TRIVIAL_GATES"  # environment variable: a folder of files that stages wait at
MODEL = Path(__file__).parent / "model"
STAND_INS = Path(__file__).parent / "stand_ins"
CONF = Path(__file__).parent / "conf"  # for `--config-dir`


def note(**line: Any) -> None:
    """Add one line to the ledger, whole even when many processes write at once."""
    told = os.environ.get(LEDGER)
    if told is None:
        return
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"{json.dumps({**line, **_place()})}\n".encode())
    finally:
        os.close(descriptor)


def wait_at_gate(name: str) -> None:
    """Wait as long as there is a gate of that name: a test decides when the stage goes on."""
    told = os.environ.get(GATES)
    while told is not None and (Path(told) / name).exists():
        time.sleep(0.01)


def _place() -> dict[str, Any]:
    """Which process writes, on which cores, and where a cluster has put it."""
    node, job = os.environ.get("SLURMD_NODENAME"), os.environ.get("SLURM_JOB_ID")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {"pid": os.getpid(), "cores": cores, "node": node, "job": job}
