"""Grids of trivial cells for a cluster's nodes, and launchers that run them through Slurm."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import codec, device
from qgrid.store import records
from qgrid.types import Choice, Gpu, PlannedCell
from tests.drills import trivial
from tests.drills.running import Running, started
from tests.slurm.cluster import Slurm

LAUNCH = (
    "import json, pathlib, sys; from qgrid import launchers; "
    "chosen = launchers.choose('slurm', json.loads(sys.argv[2])); "
    "sys.exit(launchers.launch(pathlib.Path(sys.argv[1]), chosen, len(sys.argv) > 3))"
)
GATES = "QGRID_TRIVIAL_GATES"
LEASE_SECONDS = "6"  # a lost node's owner is believed for so long


def here(gres: str) -> Gpu:
    """An entry that asks Slurm for a card and whose device is this CPU: its records are whole."""
    found = device.describe()
    return replace(found, name=f"{gres}_cpu", gres=gres)


def card(gres: str, **changes: Any) -> Gpu:
    """The card itself, which no node really has."""
    return replace(Gpu(f"{gres}_card", "cuda", gres, None, 16.0, None, 1, gres=gres), **changes)


def options(slurm: Slurm, apart: str = "$SLURMD_NODENAME", **changes: Any) -> dict[str, Any]:
    """Options of the launcher: it looks often, and each node has temporary files of its own.

    `apart`: what has them; timings wait for each other where they are the same.
    """
    lines = [f"export TMPDIR={slurm.folder / 'tmp-'}{apart}", 'mkdir -p "$TMPDIR"']
    return {"poll_seconds": 0.2, "memory_gib": 1, "cpus": 1, "setup": lines} | changes


@contextmanager
def launching(
    folder: Path, slurm: Slurm, detach: bool = False, **changes: Any
) -> Iterator[Running]:
    """A written sweep under the launcher, which is killed with its jobs when the block ends."""
    text = json.dumps(options(slurm, **changes))
    command = [sys.executable, "-c", LAUNCH, str(folder), text, *(["detach"] if detach else [])]
    with started(command, folder / "drill.log", variables(slurm, folder.parents[1])) as running:
        yield running


@contextmanager
def qgrid(slurm: Slurm, store: Path, verb: str, *words: str) -> Iterator[Running]:
    """The command line on a store, in a process of its own."""
    command = [sys.executable, "-m", "qgrid", verb, *words, f"out={store}"]
    log = store.with_name(f"{verb.strip('-')}.log")
    with started(command, log, variables(slurm, store)) as running:
        yield running


def variables(slurm: Slurm, store: Path) -> dict[str, str]:
    """The environment of a process that speaks with the cluster."""
    more = {name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")}
    more["QGRID_LEASE_SECONDS"] = LEASE_SECONDS
    more[trivial.LEDGER] = str(ledger(store))
    more[GATES] = str(store.with_name("gates"))
    return trivial.variables(**more)


def ledger(store: Path) -> Path:
    """Where the stages note what they do, beside the store."""
    return store.with_name("ledger.jsonl")


def begins(store: Path, stage: str) -> list[dict[str, Any]]:
    """Where and as which job stages of a kind have begun, in order."""
    lines = trivial.ledger(ledger(store))
    return [line for line in lines if (line["stage"], line["event"]) == (stage, "begin")]


@contextmanager
def gate(store: Path, planned: PlannedCell) -> Iterator[Path]:
    """Timings of a cell stop in the middle until the gate is removed."""
    file = store.with_name("gates") / f"speed-{codec.digest(planned.cell)}"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def finish(running: Running, slurm: Slurm) -> int:
    """Wait for the launcher, starting requeued jobs at once; its exit code."""

    def ended() -> bool:
        slurm.hurry()
        return running.process.poll() is not None

    slurm.wait(ended, f"the launcher\n{running.log.read_text()}", seconds=300)
    return int(running.process.returncode)


def statuses(store: Path, cells: Iterable[PlannedCell]) -> list[str]:
    """The status of each cell's record, in order; cells without one are `none`."""
    found = [records.read(store, each.cell_id) for each in cells]
    return ["none" if record is None else record.status for record in found]


def stored(store: Path, cells: Iterable[PlannedCell]) -> dict[Path, bytes]:
    """The records that lie there now, byte by byte."""
    files = [records.path(store, each.cell_id) for each in cells]
    return {file: file.read_bytes() for file in files if file.exists()}


def axis(gpu: Gpu, bits: Sequence[int] = (16, 8, 4), **pauses: Any) -> list[Choice]:
    """One card's cells."""
    return [trivial.choice(width, gpu=gpu, **pauses) for width in bits]
