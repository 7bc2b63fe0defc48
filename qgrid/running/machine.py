"""Who may use this machine's cores and cards: a timing alone, everything else together.

A lock file for each core and each card, of the kernel's own kind, for they never leave the machine.
They are taken in one order, so that nobody waits in a circle; who waits for one holds its turn, so
that a timing is not overtaken for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from qgrid import files

_PAUSE = 0.02  # seconds between two looks


@contextlib.contextmanager
def hold(
    cores: Collection[int] | None = None,
    alone: bool = False,
    cards: Collection[str] = (),
    stop: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Hold cores (None: all of the machine) together with others or `alone`, and cards alone.

    `stop` is called while waiting and may raise to give up.
    """
    numbers = _all() if cores is None else sorted(cores)
    with contextlib.ExitStack() as held:
        for card in sorted(cards):
            held.enter_context(_turn(f"card-{card}", True, stop))
        for number in numbers:
            held.enter_context(_turn(f"core-{number}", alone, stop))
        yield


def _all() -> list[int]:
    """Every core of the machine: their numbers need not be those from 0 to their count."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    return sorted(mine | set(range(os.cpu_count() or 1)))


@contextlib.contextmanager
def _turn(name: str, alone: bool, stop: Callable[[], object] | None) -> Iterator[None]:
    folder = files.machine_locks()
    with contextlib.ExitStack() as held:
        with _flock(folder / f"{name}.turn", fcntl.LOCK_EX, stop):
            held.enter_context(_flock(folder / name, _kind(alone), stop))
        yield


def _kind(alone: bool) -> int:
    return fcntl.LOCK_EX if alone else fcntl.LOCK_SH


@contextlib.contextmanager
def _flock(path: Path, kind: int, stop: Callable[[], object] | None) -> Iterator[None]:
    """An advisory lock on a file, freed when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while not _locked(file.fileno(), kind):
            if stop is not None:
                stop()
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
