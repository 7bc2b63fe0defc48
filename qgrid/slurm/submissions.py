"""What was submitted, on disk: `launches/<launch>/` in the sweep's folder.

Of each array `<array>.json` (its tasks) and `<array>.sh` are written first, `<array>.job` (its
number) after sbatch has answered. An array without a number is looked for in the queue by the name
of its job, so that a launcher that died in between submits nothing twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qgrid import codec
from qgrid.files import write_atomic
from qgrid.running.launch import LAUNCHES
from qgrid.running.tasks import Task, TaskList
from qgrid.slurm import client, script
from qgrid.slurm.arrays import Wave

_ARRAY = re.compile(r"[0-9]{3,}-(builds|baselines|cells)")


@dataclass(frozen=True)
class Submission:
    """One array of a launch; `job` is None until sbatch has given its number."""

    launch: str
    array: str
    tasks: tuple[Task, ...]
    job: str | None


def folder_of(folder: Path, launch: str) -> Path:
    """Where a launch of a sweep writes."""
    return folder / LAUNCHES / launch


def check(folder: Path) -> None:
    """Make sure that Slurm can write the logs of a sweep's tasks.

    Raises:
        script.UnsafeValue: it takes `%` and backslashes of a path for patterns of its own.
    """
    if bad := sorted(set("%\\") & set(str(folder))):
        raise script.UnsafeValue(
            f"Slurm cannot write logs under `{folder}`: the path holds `{bad[0]}`, which it takes "
            "for a pattern; use `out=FOLDER` or `name=SWEEP` without it"
        )


def read(folder: Path) -> list[Submission]:
    """All that was ever submitted for a sweep, in Slurm's order; what has no number first."""
    found = []
    for launch in _names(folder / LAUNCHES):
        place = folder_of(folder, launch)
        arrays = [each.removesuffix(".json") for each in _names(place) if each.endswith(".json")]
        for array in filter(_ARRAY.fullmatch, arrays):
            tasks = codec.loads(TaskList, (place / f"{array}.json").read_text(encoding="utf-8"))
            found.append(Submission(launch, array, tasks.tasks, _number(place / f"{array}.job")))
    return sorted(found, key=lambda each: 0 if each.job is None else int(each.job))


def next_arrays(folder: Path, launch: str, waves: Sequence[Wave]) -> Iterator[str]:
    """Names for further arrays of a launch, numbered in the order of submission."""
    taken = [int(each.partition("-")[0]) for each in _arrays(folder_of(folder, launch))]
    for number, wave in enumerate(waves, start=max(taken, default=0) + 1):
        yield f"{number:03d}-{wave}"


def submit(folder: Path, array: str, tasks: TaskList, text: str) -> Submission:
    """Write an array down and submit it.

    Raises:
        client.SlurmError: it was refused; nothing of it is left.
    """
    place = folder_of(folder, tasks.launch)
    (place / "logs").mkdir(parents=True, exist_ok=True)
    write_atomic(place / f"{array}.sh", text)
    write_atomic(place / f"{array}.json", codec.dumps(tasks, indent=1) + "\n")
    try:
        job = client.submit(f"{array}.sh", place)
    except client.Silent:
        raise  # it may have arrived: its name will tell
    except client.SlurmError:
        for ending in ("json", "sh"):
            (place / f"{array}.{ending}").unlink(missing_ok=True)
        raise
    return numbered(folder, Submission(tasks.launch, array, tasks.tasks, None), job)


def numbered(folder: Path, submission: Submission, job: str) -> Submission:
    """Write down the number of a submitted array."""
    place = folder_of(folder, submission.launch)
    write_atomic(place / f"{submission.array}.job", json.dumps({"job": job}) + "\n")
    return replace(submission, job=job)


def found(folder: Path, known: Sequence[Submission], jobs: Mapping[str, str]) -> list[Submission]:
    """The same with the numbers of those that the queue knows by name alone."""
    result = []
    for each in known:
        job = jobs.get(script.job_name(each.launch, each.array))
        is_new = each.job is None and job is not None
        result.append(numbered(folder, each, str(job)) if is_new else each)
    return result


def _number(file: Path) -> str | None:
    try:
        return str(int(json.loads(file.read_text(encoding="utf-8"))["job"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _arrays(place: Path) -> list[str]:
    return [each for each in _names(place) if _ARRAY.match(each)]


def _names(place: Path) -> list[str]:
    try:
        return sorted(each.name for each in place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
