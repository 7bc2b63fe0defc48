"""Sweeps in processes of their own, watched and killed; whatever a test starts ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest

from tests.drills import trivial

MARK = "QGRID_DRILL"  # environment variable: which drill a process belongs to
SECONDS = 120.0  # patience on a busy machine; nothing waits for its end


class Ended(RuntimeError):
    """A process ended before it was told to."""


class Running:
    """One process that runs a sweep, and everything below it."""

    def __init__(
        self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self._mark = uuid4().hex
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**(variables or trivial.variables()), MARK: self._mark},
                start_new_session=True,
            )

    def family(self) -> list[int]:
        """Numbers of all living processes that it started, itself included; none can hide."""
        return marked(self._mark)

    def below(self, pid: int) -> list[int]:
        """Living children of one of the family."""
        found = []
        for each in self.family():
            with suppress(OSError):
                if is_alive(each) and parent(each) == pid:
                    found.append(each)
        return found

    def pause(self, seconds: float) -> None:
        """Let it run for a while.

        Raises:
            Ended: it did not run that long.
        """
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            raise Ended

    def kill(self) -> None:
        """`kill -9` of the process alone."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """`kill -9` of it and everything below it, as often as needed."""
        self.process.kill()
        while pids := [pid for pid in self.family() if is_alive(pid)]:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(SECONDS)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something is so, while it runs.

        Raises:
            Ended: it is not so, and never will be.
        """
        deadline = time.monotonic() + SECONDS
        while not condition():
            if self.process.poll() is not None and not condition():
                raise Ended(f"ended before {what}: {self.log.read_text()}")
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.005)


def alone(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Give what is started from here its own locks of the machine: others may be timing now."""
    temporary = place / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))


@contextmanager
def started(
    command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A process of the test; nothing of it is left afterwards."""
    running = Running(command, log, variables)
    try:
        yield running
    finally:
        running.kill_all()


@contextmanager
def launching(folder: Path, under: Sequence[str] = (), **variables: str) -> Iterator[Running]:
    """A written sweep under its launcher, `under` other words; nothing is left of it afterwards."""
    told = trivial.variables(**variables)
    with started([*under, *trivial.command(folder)], _log(folder), told) as running:
        yield running


def finish(folder: Path, **variables: str) -> int:
    """Run a written sweep to its end; the exit code."""
    with launching(folder, **variables) as running:
        return running.wait()


def _log(folder: Path) -> Path:
    return folder / "drill.log"


def patiently(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def marked(mark: str) -> list[int]:
    """Living processes with a mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent(pid: int) -> int:
    """The number of a living process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
