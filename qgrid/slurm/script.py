"""The text that sbatch gets: a pure function of checked values, with golden files as its tests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from qgrid.slurm.options import Options

_SAFE = re.compile(r"[A-Za-z0-9_.,:;@%+=/*&|()\[\]-]+")


class UnsafeValue(ValueError):
    """A value that may not stand in a line of sbatch; the message names it."""


@dataclass(frozen=True)
class Resources:
    """What a task of an array asks for; None: as the cluster says."""

    gres: str | None  # "gpu:h100:2"
    constraint: str | None
    cpus: int
    memory_gib: int | None
    minutes: int


@dataclass(frozen=True)
class Job:
    """One array; `<array>.json` beside its script holds its tasks."""

    launch: str
    array: str
    num_tasks: int
    resources: Resources
    after: tuple[str, ...]  # numbers of the jobs that must have ended before, however they ended

    @property
    def name(self) -> str:
        """By which it is found again if its number was not written down."""
        return job_name(self.launch, self.array)


def render(job: Job, options: Options, python: str, folder: str) -> str:
    """The script of one array.

    Args:
        job: what to run and what it asks for.
        options: the user's.
        python: the interpreter on the nodes.
        folder: where the command was given, for relative paths; nodes without it do without.

    Raises:
        UnsafeValue: a value that Slurm or the shell could take for something else.
    """
    lines = [
        "#!/bin/bash",
        *(_line(*each) for each in _directives(job, options)),
        'qgrid_tasks="$PWD/"' + shlex.quote(f"{job.array}.json"),
        f"if [ -d {_quoted(folder)} ]; then cd -- {_quoted(folder)}; fi",
        *(("set -e", *options.setup, "set +e") if options.setup else ()),
        f'exec {_quoted(python)} -m qgrid.slurm.task "$qgrid_tasks" "$SLURM_ARRAY_TASK_ID"',
    ]
    return "\n".join(lines) + "\n"


def job_name(launch: str, array: str) -> str:
    """The name of an array's job."""
    return f"qgrid-{launch}-{array}"


def _directives(job: Job, options: Options) -> Iterator[tuple[str, str | int | None]]:
    """Names and values of the lines for sbatch; a value None: a switch."""
    throttle = "" if options.throttle is None else f"%{options.throttle}"
    warned = min(options.warn_seconds, job.resources.minutes * 50)  # before any work it is useless
    yield "job-name", job.name
    yield "array", f"0-{job.num_tasks - 1}{throttle}"
    yield "output", f"logs/{job.array}-%a.log"  # relative: no path of the user in here
    yield "open-mode", "append"
    yield ("requeue" if options.requeue else "no-requeue"), None
    yield "signal", f"B:USR1@{warned}"
    yield "time", job.resources.minutes
    yield "ntasks", 1
    yield "cpus-per-task", job.resources.cpus
    asked = job.resources
    wanted = {
        "mem": None if asked.memory_gib is None else f"{asked.memory_gib}G",
        "gres": asked.gres,
        "constraint": asked.constraint,
        "account": options.account,
        "partition": options.partition,
        "qos": options.qos,
        "dependency": f"afterany:{':'.join(job.after)}" if job.after else None,
    }
    yield from ((name, value) for name, value in wanted.items() if value is not None)
    if options.exclusive:
        yield "exclusive", None
    for argument in options.extra:
        name, _, given = argument.partition("=")
        yield name, given or None


def _line(name: str, value: str | int | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    if not _SAFE.fullmatch(str(value)):
        raise UnsafeValue(
            f"`{name}={value!r}` may not go to sbatch; use letters, digits and signs without "
            "blanks, quotes, `$` and `#`"
        )
    return f"#SBATCH --{name}={value}"


def _quoted(text: str) -> str:
    if "\0" in text:
        raise UnsafeValue(f"{text!r} holds a zero byte, which no path can")
    return shlex.quote(text)
