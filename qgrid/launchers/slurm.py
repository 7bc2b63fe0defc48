"""A Slurm cluster: one job array for each kind of resources, submitted with sbatch.

Slurm's commands are used as they are. The library submitit was left out: it carries functions and
results as pickles, sees a job's end only where there is `sacct`, and gives all tasks of an array
the same resources and no order among arrays; what is left of it is the text of a script.
"""

from __future__ import annotations

from pathlib import Path

from qgrid.queued import Standing
from qgrid.slurm.options import Options

__all__ = ["REMOTE", "Options", "cancel", "launch", "standing"]

REMOTE = True


def launch(folder: Path, options: Options, detach: bool) -> int:
    """Submit what is neither done nor queued and wait for its records; the exit code."""
    from qgrid.slurm import watch

    return watch.run(folder, options, detach)


def standing(folder: Path) -> dict[str, Standing]:
    """Where the cells that were submitted stand, by cell id."""
    from qgrid.slurm import queue

    return queue.standing(folder)


def cancel(folder: Path) -> list[str]:
    """End the sweep's jobs; a line for each."""
    from qgrid.slurm import queue

    return queue.cancel(folder)
