"""This machine: worker slots by device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveInt

from qgrid import commands
from qgrid.running import launch as launches

REMOTE = False
LOG = "detached.log"


@dataclass(frozen=True)
class Options:
    """`slots`: cells at once; None: one for each group of cards, or as cores and memory allow."""

    slots: PositiveInt | None


def launch(folder: Path, options: Options, detach: bool) -> int:
    """Run the cells of a sweep here; the exit code."""
    if detach:
        return _detach(folder)
    from qgrid import sweep

    return sweep.run_cells(str(folder / "plan.jsonl"), slots=options.slots)


def cancel(folder: Path) -> list[str]:
    """End every launch of the sweep that runs on this machine; a line for each that runs."""
    said = []
    for owner in launches.owners(folder).values():
        if owner.is_here:
            os.kill(owner.pid, signal.SIGTERM)
            said.append(f"process {owner.pid} was told to end")
        else:
            said.append(f"process {owner.pid} runs on {owner.host}; give this command there")
    return said


def _detach(folder: Path) -> int:
    """Go on in a process of its own that outlives the terminal."""
    log = folder / LOG
    command = [sys.executable, "-m", "qgrid", "resume", folder.name, f"out={folder.parents[1]}"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    sys.stdout.write(
        f"process {process.pid} goes on (its output: {log}); "
        f"`{commands.command('status', folder)}` tells how far it is\n"
    )
    return 0
