"""Leases whose owners are dead: found, given back, and those of other machines watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from qgrid.store import leases

_LOOKS = 60  # at a silent owner until it counts as dead


def taken(store: Path) -> list[Path]:
    """The leases that somebody holds, or held when it died."""
    folders = [path for path in sorted((store / "leases").glob("*/*")) if path.is_dir()]
    return [folder for folder in folders if not leases.is_released(folder)]


def is_known_dead(folder: Path) -> bool:
    """Whether a taken lease has an owner that certainly ended: a process of this machine."""
    return _content(folder) != b"" and leases.owner(folder) is None


def give_back(folder: Path) -> bool:
    """Release a taken lease if its owner is dead by now; whether it was."""
    lease = leases.attempt(folder)
    if lease is None:
        return False
    lease.release()
    return True


def watch(folders: Collection[Path], tell: Callable[[str], None]) -> list[Path]:
    """Release the leases whose owners give no sign of life for as long as `leases` allows.

    A living owner shows itself by a heartbeat, mostly in a tenth of that time; the watch ends when
    every owner is known to be either.
    """
    waiting = {folder: _content(folder) for folder in folders if not give_back(folder)}
    if waiting:
        tell(
            f"{len(waiting)} leases are held on other machines: watching them for a sign of life, "
            f"at most {leases.seconds():g} s"
        )
    dead = [folder for folder in folders if folder not in waiting]
    deadline = time.monotonic() + 2 * leases.seconds()
    while waiting and time.monotonic() < deadline:
        time.sleep(leases.seconds() / _LOOKS)
        for folder, seen in list(waiting.items()):
            if _content(folder) != seen:
                del waiting[folder]
            elif give_back(folder):
                del waiting[folder]
                dead.append(folder)
    return dead


def _content(folder: Path) -> bytes | None:
    """The highest number's file: the owner, and a byte a heartbeat; None where there is none."""
    try:
        numbers = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        return (folder / str(max(numbers))).read_bytes() if numbers else None
    except (FileNotFoundError, NotADirectoryError):
        return None
