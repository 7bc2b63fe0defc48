"""Slurm's own commands as typed functions; nothing else here knows their arguments or output."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120.0  # a busy controller answers late
# what a job ends as; in any other state it may still run
ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
_FORMAT = "%F|%K|%T|%N|%j|%r"


class SlurmError(RuntimeError):
    """A command of Slurm that failed; the message is one sentence with what it said."""


class Silent(SlurmError):
    """Slurm's controller does not answer now; later it may."""


@dataclass(frozen=True)
class TaskState:
    """One task of an array (`index` None: not of an array) as Slurm knows it."""

    job: str
    index: int | None
    state: str
    nodes: str = ""
    name: str = ""  # of the job
    reason: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs, or Slurm may start it again."""
        return self.state not in ENDED

    @property
    def label(self) -> str:
        """As Slurm's commands take it."""
        return self.job if self.index is None else f"{self.job}_{self.index}"


@dataclass(frozen=True)
class Cluster:
    """What of the cluster's configuration matters here."""

    max_array_size: int
    accounts: bool  # whether `sacct` remembers jobs that have left the queue
    memory_seconds: float = 300.0  # for which the queue remembers a job that has ended


def submit(script: str, folder: Path) -> str:
    """Submit a script of `folder`, which becomes its working directory; the job's number.

    Raises:
        SlurmError: it was refused.
    """
    said = _run(["sbatch", "--parsable", script], folder).strip()
    number = said.rpartition("\n")[2].partition(";")[0]  # some sites' sbatch greets before it
    if not number.isdigit():
        raise SlurmError(f"sbatch gave no number of a job but `{_line(said)}`")
    return number


def queue() -> list[TaskState]:
    """All tasks of this user that Slurm still knows, also those that ended a while ago."""
    user = str(os.getuid())
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={user}"]
    return parse_queue(_run([*command, f"--format={_FORMAT}"]))


def history(jobs: Sequence[str]) -> list[TaskState]:
    """The same from Slurm's accounting; only where `Cluster.accounts`."""
    if not jobs:
        return []
    fields = "--format=JobID,State,NodeList,JobName"
    return parse_history(
        _run(
            [
                "sacct",
                "--noheader",
                "--parsable2",
                "--allocations",
                f"--jobs={_joined(jobs)}",
                fields,
            ]
        )
    )


def cluster() -> Cluster:
    """The cluster's configuration."""
    return parse_config(_run(["scontrol", "show", "config"]))


def cancel(jobs: Sequence[str]) -> None:
    """End jobs by number, `12`, or tasks, `12_3`; those that have ended do not matter."""
    if jobs:
        _run(["scancel", "--quiet", *_numbers(jobs)])


def requeue(task: str) -> None:
    """Start a running task again from its beginning, after its turn in the queue."""
    _run(["scontrol", "requeue", *_numbers([task])])


def state(task: str) -> str | None:
    """The state of one task now; None where Slurm does not know it."""
    said = _run(
        ["squeue", "--noheader", "--states=all", f"--jobs={_joined([task])}", "--format=%T"]
    )
    return said.split()[0] if said.split() else None


# --- their output --------------------------------------------------------------------------------


def parse_queue(text: str) -> list[TaskState]:
    """The lines of `squeue` in the format asked for above."""
    found = []
    for line in text.splitlines():
        fields = line.strip().split("|", 5)
        if len(fields) == 6:
            job, index, state, nodes, name, reason = fields
            number = int(index) if index.isdigit() else None
            found.append(TaskState(job, number, state, nodes, name, reason))
    return found


def parse_history(text: str) -> list[TaskState]:
    """The lines of `sacct`; tasks that never started come as ranges, `12_[3-5,8%2]`."""
    found = []
    for line in text.splitlines():
        fields = line.split("|", 3)
        if len(fields) == 4:
            label, state, nodes, name = fields
            job, _, index = label.partition("_")
            word = state.partition(" ")[0]  # "CANCELLED by 1000"
            for each in _indices(index):
                found.append(TaskState(job, each, word, nodes, name))
    return found


def parse_config(text: str) -> Cluster:
    """What of `scontrol show config` matters; 1001 is Slurm's own default size of arrays."""
    found = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", text, flags=re.MULTILINE))
    accounts = found.get("AccountingStorageType", "")
    return Cluster(
        max_array_size=int(found.get("MaxArraySize", "1001")),
        accounts=bool(accounts) and not accounts.endswith(("/none", "(null)")),
        memory_seconds=_memory_seconds(found.get("MinJobAge", "300 sec")),
    )


def _memory_seconds(text: str) -> float:
    """`300 sec`; 0 is for ever."""
    seconds = float(text.partition(" ")[0])
    return seconds if seconds else math.inf


def _indices(text: str) -> Iterable[int | None]:
    if not text:
        return [None]
    found: list[int | None] = []
    for part in text.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last if last.isdigit() else first) + 1)
    return found


def _numbers(jobs: Sequence[str]) -> Sequence[str]:
    for job in jobs:
        if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
            raise SlurmError(f"`{job}` is no number of a job")
    return jobs


def _joined(jobs: Sequence[str]) -> str:
    return ",".join(_numbers(jobs))


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    """What a command printed.

    Raises:
        Silent: the controller does not answer.
        SlurmError: there is no such command, or it failed.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=_variables(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"this machine has no `{command[0]}`; launch from a login node of the cluster, or use "
            "`hydra/launcher=local`"
        ) from None
    except subprocess.TimeoutExpired:
        raise Silent(f"`{command[0]}` did not answer within {SECONDS:g} s") from None
    if done.returncode == 0:
        return done.stdout
    said = _line(done.stderr or done.stdout) or f"exit code {done.returncode}"
    kind = Silent if re.search(r"contact slurm controller|timed out", said, re.I) else SlurmError
    raise kind(f"`{command[0]}` failed: {said}")


def _variables() -> dict[str, str]:
    """The environment without variables that would change what these commands do or print."""
    own = ("SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SLURM_TIME_FORMAT")
    return {key: value for key, value in os.environ.items() if not key.startswith(own)}


def _line(text: str) -> str:
    return " ".join(text.split())
