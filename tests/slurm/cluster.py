"""A real Slurm of several nodes on the loopback, for as long as a block runs.

Each node is a `slurmd -N` of this machine with its own port; its cores, its memory and its GPUs
are as configured, not as found. Nothing is shared with a Slurm of the machine: the folder, the
ports, the key and the socket of munge are the cluster's own, and at the end all its processes are
killed, those of its jobs included. Any user may; where root does, each node numbers its processes
apart, so that none can ask whether one of another node still lives.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.slurm import layout
from tests.slurm.layout import NODES, PLAIN, Layout, Node

__all__ = ["NODES", "PLAIN", "Layout", "Node", "Slurm", "can_part", "missing", "running"]

PROGRAMS = ("setpriv", "slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
LEASH = ("setpriv", "--pdeathsig", "KILL")  # nothing outlives the tests, however these end
APART = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")  # own process numbers
NODE = "QGRID_TEST_NODE"  # in the environment of a node's daemons
SECONDS = 60.0  # patience of a test on a busy machine; nothing waits for its end


def missing() -> str | None:
    """Why no Slurm can be brought up here, None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if not absent:
        return None
    return f"no Slurm here (missing: {', '.join(absent)}); run `make test-system`"


@cache
def can_part() -> bool:
    """Whether nodes may number their processes apart, as machines do; that takes root."""
    return subprocess.run([*APART, "true"], capture_output=True).returncode == 0


@dataclass
class Slurm:
    """A running cluster; `environment` is what a process needs to speak with it."""

    folder: Path
    layout: Layout
    environment: dict[str, str]
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def queue(self) -> list[tuple[str, str, str]]:
        """Array task or job, state and reason of all that wait or run."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i|%T|%r").splitlines()
        return [(task, state, reason) for task, state, reason in map(_fields, lines)]

    def states(self) -> dict[str, str]:
        """Nodes by name, with their states."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N|%T").splitlines()
        return dict(line.split("|") for line in lines)

    def jobs(self) -> list[dict[str, str]]:
        """All that Slurm still knows of each job and array task, also of those that ended."""
        lines = self.run("scontrol", "--oneliner", "show", "job").splitlines()
        return [dict(re.findall(r"(\w[\w/:]*)=(\S*)", line)) for line in lines if "=" in line]

    def hurry(self) -> None:
        """Start jobs now that were requeued; Slurm lets them wait for two minutes."""
        for task, state, reason in self.queue():
            if (state, reason) == ("PENDING", "BeginTime"):
                self.run("scontrol", "update", f"job={task}", "StartTime=now")

    def wait_empty(self) -> None:
        """Wait until no job waits or runs."""
        self.wait(lambda: not self.queue(), "an empty queue")

    def wait(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        """Wait until a callable is true; the cluster's logs are shown where it never is."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, each in self._daemons.items() if each.poll() is not None]
            assert not ended, f"{ended} ended while waiting for {what}\n{self.logs()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self.logs()}"
            time.sleep(0.05)

    def tasks(self, node: str) -> list[int]:
        """The processes of a node's jobs."""
        return self.processes(f"SLURMD_NODENAME={node}")

    def daemons(self, node: str) -> list[int]:
        """The node's `slurmd` and its `slurmstepd`."""
        return self.processes(f"{NODE}={node}")

    def lose(self, node: str) -> None:
        """The node loses its power: nothing of it is left, and nobody is told."""
        pids = [*self.daemons(node), *self.tasks(node)]
        _kill(pids)
        self._daemons.pop(node).wait()

    def restart(self) -> None:
        """Kill the controller of the cluster and start it again; it reads its state from disk."""
        self._daemons["slurmctld"].kill()
        self._daemons.pop("slurmctld").wait()
        self._start("slurmctld", "slurmctld", "-D")

    def cut_off(self, node: str) -> None:
        """The node loses its network: its daemons are silent, its tasks go on."""
        _kill(self.daemons(node), signal.SIGSTOP)

    def join(self, node: str) -> None:
        """The network of a node that was cut off comes back."""
        _kill(self.daemons(node), signal.SIGCONT)

    def boot(self, node: str) -> None:
        """Start a node, at first or after it was lost."""
        apart = APART if can_part() else ()
        self._start(node, *apart, "slurmd", "-D", "-N", node, extra={NODE: node})

    def logs(self) -> str:
        """The ends of all logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)

    def start(self) -> None:
        """Bring all daemons up and wait until each node answers."""
        layout.write(self.folder, self.layout)
        own = [f"--{what}={self.folder / name}" for what, name in layout.MUNGE.items()]
        self._start("munged", "munged", "--foreground", *own)
        self.wait((self.folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for node in self.layout.nodes:
            self.boot(node.name)
        names = {node.name for node in self.layout.nodes}

        def up() -> bool:
            with contextlib.suppress(AssertionError):  # the controller does not answer yet
                return self.states() == dict.fromkeys(names, "idle")
            return False

        self.wait(up, "all nodes")

    def stop(self) -> None:
        """Kill all that belongs to the cluster, until nothing does."""
        for process in self._daemons.values():
            process.kill()
        for process in self._daemons.values():
            process.wait()
        while pids := self.processes():
            _kill(pids)
            time.sleep(0.02)

    def _start(self, name: str, *command: str, extra: Mapping[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*LEASH, *command],
                env={**self.environment, **(extra or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )

    def processes(self, setting: str | None = None) -> list[int]:
        """Processes started with this cluster's configuration, and with `setting` if given."""
        wanted = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        if setting is not None:
            wanted.add(setting.encode())
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted <= set(file.read_bytes().split(b"\0")):
                    found.append(int(file.parent.name))
        return [pid for pid in found if pid != os.getpid()]


@contextlib.contextmanager
def running(wanted: Layout = PLAIN) -> Iterator[Slurm]:
    """A cluster inside the block; nothing of it is left after it."""
    folder = Path(tempfile.mkdtemp(prefix="qgrid-slurm-", dir="/tmp"))  # sockets need short names
    folder.chmod(0o755)  # munge wants it so
    own = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    slurm = Slurm(folder, wanted, {**kept, **own})
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder)


def _fields(line: str) -> list[str]:
    return line.split("|")


def _kill(pids: Sequence[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
