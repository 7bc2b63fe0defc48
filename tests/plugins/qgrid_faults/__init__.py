"""Stages that fail in every way that a stage can fail, each in the real process that runs it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CGROUP = "QGRID_FAULTS_CGROUP"  # a memory cgroup to allocate in
LIMIT_BYTES = 4 << 30


def act(name: str) -> None:
    """Do the deed; `work` does nothing."""
    deeds: dict[str, Callable[[], object]] = {
        "work": lambda: None,
        "abort": os.abort,
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "exit": lambda: os._exit(7),
        "raise": _raise,
        "hang": _hang,
        "deaf": _hang_deaf,
        "allocate": _allocate,
        "cgroup": _allocate_in_cgroup,
        "kill_parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
    }
    deeds[name]()


def _raise() -> None:
    raise RuntimeError("cannot reach https://me:hunter2hunter2@example.org/x")


def _hang() -> None:
    _say(os.getpid())
    while True:
        time.sleep(60)


def _hang_deaf() -> None:
    """Hang with a process of its own beside it, and do not listen when asked to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _say(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    _hang()


def _allocate() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    bytearray(2 * LIMIT_BYTES)


def _allocate_in_cgroup() -> None:
    (Path(os.environ[CGROUP]) / "cgroup.procs").write_text(str(os.getpid()))
    kept = []
    while True:
        kept.append(bytearray(b"x" * (16 << 20)))


def _say(pid: int) -> None:
    print(f"pid {pid}", flush=True)
