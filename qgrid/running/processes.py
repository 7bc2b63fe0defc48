"""The controller's side of the worker: start stages, wait without polling, kill what hangs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qgrid.envs.recipes import MAIN
from qgrid.running.interpreters import UnknownInterpreter, interpreter, variables
from qgrid.running.stopping import Stop, Stopped
from qgrid.running.worker import kill_group

__all__ = ["Ended", "UnknownInterpreter", "Worker", "WorkerLost", "interpreter"]

START_SECONDS = 300.0  # for the imports of a cold parent
GRACE_SECONDS = 3.0  # for a stage to remove what it has half built
REPORT_SECONDS = 60.0  # for the parent to report that its child ended; it may be importing


class WorkerLost(RuntimeError):
    """The warm parent died or stopped answering."""


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended. `code` is negative for a signal, None when nobody saw it."""

    code: int | None
    timed_out: bool
    oom_killed: bool


class Worker:
    """One warm parent, started when the first stage needs it and replaced when it is lost.

    Raises:
        UnknownInterpreter: nobody has built its environment here.
    """

    def __init__(
        self,
        environment: str,
        log: Path,
        told: Mapping[str, str],
        ahead: Sequence[str] = (),
        stop: Stop | None = None,
    ) -> None:
        """`told`: environment variables of the worker beside those of its environment."""
        self._command = [interpreter(environment), "-m", "qgrid.running.worker", *ahead]
        self._shown = None if environment == MAIN else tempfile.TemporaryDirectory(prefix="qgrid-")
        shown = None if self._shown is None else Path(self._shown.name)
        self._variables = variables(environment, shown) | dict(told)
        self._stop = stop
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._child: int | None = None
        self._child_ended = False
        self._lines: list[str] = []
        self._rest = b""

    def run(self, job: Path, limit: float) -> Ended:
        """Run the stage of a job file to its end, at most `limit` seconds.

        Raises:
            WorkerLost: the parent was lost twice.
            Stopped: the sweep was told to end; nothing of the stage is left running.
        """
        kills = oom_kills()
        try:
            code, timed_out = self._run(job, limit)
        except WorkerLost:
            self.close()
            self._command = self._command[:3]  # nothing ahead this time: it may be what hung
            code, timed_out = self._run(job, limit)
        except Stopped:
            self.close()
            raise
        return Ended(code, timed_out, code == -signal.SIGKILL and oom_kills() > kills)

    def close(self) -> None:
        """End the stage that runs, if any, and the parent; nothing of them is left."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._child is not None and process.poll() is None:
            self._process = process
            with contextlib.suppress(WorkerLost):
                self._end_child()
            self._process = None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._child is not None:
            kill_group(self._child)
        self._child, self._lines, self._rest = None, [], b""

    def _run(self, job: Path, limit: float) -> tuple[int | None, bool]:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(str(job)).encode() + b"\n")  # any path is a line
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerLost("the worker ended before the stage started") from None
        line = self._line(START_SECONDS, heed=True)
        if line is None or not line.startswith("started "):
            raise WorkerLost(f"the worker did not start the stage in {START_SECONDS:g} s")
        self._child, self._child_ended = int(line.split()[1]), False
        line = self._line(limit, watch=True, heed=True)
        if line is not None:
            return self._ended(line), False
        timed_out = not self._child_ended
        try:
            return self._end_child(explain=timed_out), timed_out
        except WorkerLost:  # it hangs; what the stage wrote counts all the same
            self.close()
            return None, timed_out

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    env=self._variables,
                    start_new_session=True,  # Ctrl-C of the terminal is the controller's to handle
                )
        return self._process

    def _ended(self, line: str) -> int:
        self._child = None
        return int(line.split()[2])

    def _end_child(self, explain: bool = False) -> int | None:
        """End the child: first asked, so that it cleans up, then killed with all it started."""
        child = self._child
        assert child is not None
        numbers = [signal.SIGUSR1, signal.SIGTERM] if explain else [signal.SIGTERM]
        for number in numbers:  # the first writes the stack into the log
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        line = self._line(GRACE_SECONDS)
        if line is None:
            kill_group(child)
            line = self._line(REPORT_SECONDS)
        if line is None:
            raise WorkerLost("the worker does not report the end of its child")
        return self._ended(line)

    def _line(self, seconds: float, watch: bool = False, heed: bool = False) -> str | None:
        """The parent's next line, None after `seconds`.

        With `watch`, the end of the child shortens the wait: the parent must report it soon. With
        `heed`, the end of the sweep ends it.
        """
        process = self._process
        assert process is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector, _end_of(self._child, watch) as ending:
            selector.register(process.stdout, selectors.EVENT_READ)
            if ending is not None:
                selector.register(ending, selectors.EVENT_READ)
            if heed and self._stop is not None:
                selector.register(self._stop, selectors.EVENT_READ)
            while not self._lines:
                left = deadline - time.monotonic()
                ready = [key.fileobj for key, _ in selector.select(max(0.0, left))]
                if self._stop in ready and self._stop is not None:
                    self._stop.check()
                if process.stdout in ready:
                    self._read(process)
                elif ending is not None and ending in ready:
                    selector.unregister(ending)
                    self._child_ended = True
                    deadline = min(deadline, time.monotonic() + REPORT_SECONDS)
                elif left <= 0:
                    return None
        return self._lines.pop(0)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            raise WorkerLost(f"the worker ended by itself (its output: {self._log})")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._lines += [line.decode() for line in lines]


@contextlib.contextmanager
def _end_of(pid: int | None, watch: bool) -> Iterator[int | None]:
    """A descriptor that becomes readable when the process ends; None where there is none."""
    descriptor = None
    if watch and pid is not None and hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):  # it has ended and was reaped: the line is under way
            descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def oom_kills() -> int:
    """How often the kernel has killed for want of memory: on this machine and in this cgroup.

    A stage that died of SIGKILL while this number rose counts as out of memory. Another process
    killed for memory in the same interval would be mistaken for it only if somebody else also
    killed the stage by hand.
    """
    total = 0
    for file in (Path("/proc/vmstat"), *_cgroup_files()):
        with contextlib.suppress(OSError):
            for count in re.findall(r"^oom_kill (\d+)$", file.read_text(), flags=re.MULTILINE):
                total += int(count)
    return total


def _cgroup_files() -> list[Path]:
    """Where this process's memory cgroup counts its kills (version 2 and version 1)."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, group = line.split(":", 2)
            if names == "":
                found.append(Path(f"/sys/fs/cgroup{group}/memory.events"))
            elif "memory" in names.split(","):
                found.append(Path(f"/sys/fs/cgroup/memory{group}/memory.oom_control"))
    return found
