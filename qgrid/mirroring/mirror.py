"""The mirroring process: writes records as W&B runs beside the sweep, at the lowest priority.

`python -m qgrid.mirroring.mirror STORE SWEEP PROJECT [ENTITY]` reads the path of a record a line on
stdin, and answers `done CELL_ID` for a mirrored record and `say SENTENCE` for what the user should
know.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from qgrid import redact
from qgrid.mirroring import tracking, wandb_run
from qgrid.running import machine
from qgrid.store import records
from qgrid.types import Record, Tracking

PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Mirror the records named on stdin until it ends."""
    answers = _own_stdout()
    _die_with_parent()
    os.nice(19)
    store, sweep, project = Path(arguments[0]), arguments[1], arguments[2]
    target = Tracking("wandb", project, arguments[3] if len(arguments) > 3 else None)
    with _unhurried():  # imports wandb, so that the first record need not wait for it
        session = _Session(target, sweep, store, answers)
    for line in sys.stdin:
        session.mirror(Path(line.rstrip("\n")))
    return 0


class _Session:
    """Mirrors one record after the other; after a failure online the rest is kept offline."""

    def __init__(self, target: Tracking, sweep: str, store: Path, answers: TextIO) -> None:
        self._target = target
        self._sweep = sweep
        self._store = store
        self._answers = answers
        self._mode = wandb_run.wanted_mode()
        if self._mode == "online" and not wandb_run.is_reachable():
            self._go_offline(f"{wandb_run.server()} does not answer")

    def mirror(self, path: Path) -> None:
        """One record; what goes wrong is told once and costs nothing else."""
        record = records.load(path)
        if record is None:
            return
        with _unhurried():
            if self._mode == "online" and not self._write(record):
                self._go_offline("it did not take a run (see wandb/mirror.log)")
            if self._mode == "online" or self._write(record):
                self._answer(f"done {record.cell_id}")

    def _write(self, record: Record) -> bool:
        try:
            wandb_run.mirror(record, self._sweep, self._target, self._store, self._mode)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the sweep goes on
            sys.stderr.write(f"{record.cell_id}: {redact.text(repr(error))}\n")
            return False
        return True

    def _go_offline(self, reason: str) -> None:
        self._mode = "offline"
        self._answer(f"say W&B: {reason}; runs are kept offline, and {tracking.REPLAY}")

    def _answer(self, line: str) -> None:
        self._answers.write(line + "\n")
        self._answers.flush()


def _own_stdout() -> TextIO:
    """The pipe to the controller; whatever else prints goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _die_with_parent() -> None:
    """Have the kernel end this process when the controller is gone (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _unhurried() -> Iterator[None]:
    """Wait until no timing runs, then hold timings off for at most two seconds.

    What takes longer waits for the network, which disturbs no timing.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(machine.hold())
        limit = threading.Timer(tracking.SECONDS_A_RECORD, held.close)
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            limit.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
