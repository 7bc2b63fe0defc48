"""One task of an array, on its node: `python -m qgrid.slurm.task FILE INDEX`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qgrid import codec
from qgrid.running import tasks
from qgrid.slurm import client
from qgrid.store import leases


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the work of a task; its exit code.

    A task that was told to end with work left asks Slurm to start it again, unless that is under
    way already (a lost node, a preemption) or somebody cancelled it.
    """
    file, index = sys.argv[1:] if arguments is None else arguments
    path = Path(file).absolute()
    try:
        listed = codec.loads(tasks.TaskList, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"qgrid: {path}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    label = _label()
    os.environ[leases.LAUNCH] = listed.launch
    if label is not None:
        os.environ[leases.JOB] = label
    code = tasks.run(path.parents[2], listed, int(index))
    if code == tasks.AGAIN and label is not None:
        _ask_again(label)
    return code


def _label() -> str | None:
    """The task as Slurm's commands name it; None outside a job."""
    job, index = (os.environ.get(f"SLURM_ARRAY_{each}_ID") for each in ("JOB", "TASK"))
    return None if job is None or index is None else f"{job}_{index}"


def _ask_again(label: str) -> None:
    try:
        if client.state(label) == "RUNNING":
            print(f"qgrid: asking Slurm to start {label} again", flush=True)  # noqa: T201
            client.requeue(label)
    except client.SlurmError as error:  # whoever waits for the records submits it again
        print(f"qgrid: {error}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
