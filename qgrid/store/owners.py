"""Who holds a lease: a process by its machine, number and beginning, and whether it lives."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4

LAUNCH = "QGRID_LAUNCH"  # variable: the launch that this process works for
JOB = "QGRID_JOB"  # variable: the cluster's name of this job


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease."""

    token: str
    host: str
    boot: str  # of the machine, and the namespace of process numbers: where `pid` means something
    pid: int
    started: str | None  # clock ticks after boot: tells a process from a later one of its number
    launch: str | None = None
    job: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether its process number can be looked up by this process."""
        return self.boot == _boot() and not _is_hidden(self.pid)

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended."""
        return self.is_here and _started(self.pid) != self.started


def myself() -> Owner:
    """This process, with a token of its own for each lease."""
    pid = os.getpid()
    told = (os.environ.get(LAUNCH), os.environ.get(JOB))
    return Owner(uuid4().hex, platform.node(), _boot(), pid, _started(pid), *told)


@cache
def _boot() -> str:
    """Where a process number means the same as here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - it points nowhere
    except OSError:
        return platform.node()


def _is_hidden(pid: int) -> bool:
    """Whether it is another user's process, where `/proc` shows everybody their own alone."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except OSError:
        pass
    return False


def _started(pid: int) -> str | None:
    """When a living process began; None when there is none of that number."""
    if not Path("/proc/self/stat").exists():
        return _started_elsewhere(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = fields.rpartition(")")[2].split()
    return None if after_name[0] in {"Z", "X"} else after_name[19]


def _started_elsewhere(pid: int) -> str | None:
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
