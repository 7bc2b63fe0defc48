"""What `conf/hydra/launcher/slurm.yaml` may say; values are checked before a script holds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, PositiveFloat, PositiveInt

from qgrid import redact

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*")
_FEATURES = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:&|*()\[\]+-]*")
_KEY = re.compile(r"[a-z]+(-[a-z]+)*")
_VALUE = re.compile(r"[A-Za-z0-9_.,:;@%+=/*&|()\[\]-]+")
_OWN = frozenset(  # what the script says itself, or what would make it another job
    [
        "array",
        "chdir",
        "clusters",
        "comment",
        "dependency",
        "error",
        "export-file",
        "get-user-env",
        "gres",
        "gpus",
        "input",
        "job-name",
        "no-requeue",
        "ntasks",
        "open-mode",
        "output",
        "parsable",
        "requeue",
        "signal",
        "test-only",
        "time",
        "uid",
        "gid",
        "wait",
        "wrap",
        "account",
        "partition",
        "qos",
        "constraint",
        "cpus-per-task",
        "exclusive",
        "mem",
    ]
)


def name(value: str) -> str:
    """A name of Slurm's (account, partition, type of card), as it may stand in a script."""
    return _matched(_NAME, value, "letters, digits and `_.,@+-`, not `-` first")


def features(value: str) -> str:
    """Features that a node must have, with Slurm's signs between them."""
    return _matched(_FEATURES, value, "names of features with `&|*()[],` between them")


def shell_line(value: str) -> str:
    """A line of the user's own shell code: one line, without a secret."""
    if not value.isprintable():
        raise ValueError("one printable line; give several as several items")
    if redact.text(value) != value:
        raise ValueError("a line without a secret; export it where you launch, jobs inherit it")
    return value


def path(value: str) -> str:
    """A path of an interpreter on the nodes."""
    if not value or not value.isprintable():
        raise ValueError("a printable path")
    return value


def argument(value: str) -> str:
    """A further argument of sbatch, `reservation=night`: one that qgrid does not write itself."""
    key, equals, given = value.removeprefix("--").partition("=")
    if not _KEY.fullmatch(key):
        raise ValueError("a long argument of sbatch, such as `reservation=night`")
    if any(own.startswith(key) for own in _OWN):  # sbatch takes beginnings of names, too
        raise ValueError(f"an argument that qgrid does not write itself, not `{key}`")
    if equals and not _VALUE.fullmatch(given):
        raise ValueError("a long argument of sbatch without blanks, quotes and shell signs")
    return f"{key}{equals}{given}"


def _matched(pattern: re.Pattern[str], value: str, allowed: str) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(allowed)
    return value


Name = Annotated[str, AfterValidator(name)]
Features = Annotated[str, AfterValidator(features)]
ShellLine = Annotated[str, AfterValidator(shell_line)]
PythonPath = Annotated[str, AfterValidator(path)]
Argument = Annotated[str, AfterValidator(argument)]


@dataclass(frozen=True)
class Options:
    """How cells become jobs. None: as the cluster, earlier records or the plan say."""

    account: Name | None = None
    partition: Name | None = None
    qos: Name | None = None
    constraint: Features | None = None  # joined to that of the device by `&`
    minutes: PositiveInt | None = None  # time limit of a task
    memory_gib: PositiveInt | None = None  # of the host, for a task
    cpus: PositiveInt | None = None  # of a task
    exclusive: bool = False  # whole nodes: nobody else's work beside a timing
    throttle: PositiveInt | None = None  # tasks of one array at once
    cells_per_task: PositiveInt | None = None
    attempts: PositiveInt = 3  # of a cell before it becomes `crashed` or `timeout`
    requeue: bool = True  # Slurm may start a task again after a lost node or a preemption
    warn_seconds: PositiveInt = 120  # before the time limit, to end cleanly
    poll_seconds: PositiveFloat = 5.0  # between two looks at the queue
    python: PythonPath | None = None  # interpreter on the nodes; None: the one of this command
    setup: tuple[ShellLine, ...] = ()  # shell lines before it, verbatim
    extra: tuple[Argument, ...] = ()  # further arguments of sbatch
