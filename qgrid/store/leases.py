"""Locks as files, for a store on a network file system: one owner each, taken over when it is dead.

A lease is a folder of numbered files, of which the highest counts. To take it is to create the next
number, which only one can (`O_EXCL`), and to look again: a view of the folder that was out of date
shows then. The file tells its owner and grows by a byte a heartbeat; it is released in place, so
that a number is never used twice. An owner of this machine is dead when its process is gone;
another one when its file did not change for `QGRID_LEASE_SECONDS` by the clock of who looks. No
clocks of two machines, and no time of day, are ever compared: a step of a clock changes nothing.

Advisory locks of the kernel are not used: on network file systems they need a service that often
is not there, and then they lock nothing or wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from qgrid import codec
from qgrid.store.owners import JOB, LAUNCH, Owner, myself

__all__ = [
    "JOB",
    "LAUNCH",
    "Lease",
    "Lost",
    "Owner",
    "attempt",
    "held",
    "is_released",
    "of",
    "owner",
    "seconds",
]

Kind = Literal["cells", "quality", "artifacts", "sweeps", "launches", "mirrors"]
SECONDS = "QGRID_LEASE_SECONDS"  # variable: how long a silent owner of another machine is believed
_RELEASED = b"x"
_SHORTEST, _LONGEST = 0.02, 1.0  # seconds between two looks of who waits


class Lost(RuntimeError):
    """A lease was taken over: its owner was believed to be dead."""


class Lease:
    """A lease that this process holds."""

    def __init__(self, file: Path, token: str) -> None:
        self.file = file
        self._token = token

    def check(self) -> None:
        """Make sure that nobody took it over; to be asked before a result is published.

        Raises:
            Lost: somebody did.
        """
        highest = _highest(self.file.parent)
        owner = _owner(self.file)
        if highest != int(self.file.name) or owner is None or owner.token != self._token:
            raise Lost(f"another process has taken over {self.file.parent}")

    def release(self) -> None:
        """Give it back; one that was lost is not touched."""
        _PULSE.remove(self)
        with contextlib.suppress(Lost, OSError):
            self.check()
            _overwrite(self.file, _RELEASED)

    def beat(self) -> None:
        """Show that its owner lives."""
        with contextlib.suppress(OSError):  # a full disk, or it is lost: `check` will tell
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND)
            with contextlib.closing(os.fdopen(descriptor, "wb", buffering=0)) as file:
                file.write(b".")


def of(store: Path, kind: Kind, name: str) -> Path:
    """The folder of a lease."""
    return store / "leases" / kind / name


def attempt(folder: Path) -> Lease | None:
    """Take the lease if nobody has it, or if its owner is dead; None otherwise. Never waits.

    Raises:
        OSError: the store cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = _highest(folder)
    if last and not _is_free(folder / str(last)):
        return None
    file, me = folder / str(last + 1), myself()
    try:
        _create(file, codec.dumps(me).encode() + b"\n")
    except FileExistsError:
        return None
    numbers = _numbers(folder)
    if max(numbers) != last + 1 or (last and last not in numbers):
        file.unlink(missing_ok=True)  # what was seen first was out of date
        return None
    for number in sorted(numbers)[:-1]:  # the lowest first: who still sees it finds it gone
        (folder / str(number)).unlink(missing_ok=True)
    lease = Lease(file, me.token)
    _PULSE.add(lease)
    return lease


@contextlib.contextmanager
def held(folder: Path, stop: Callable[[], object] | None = None) -> Iterator[Lease]:
    """Hold the lease, waiting for it; `stop` is called at each look and may raise to give up."""
    pause = _SHORTEST
    while (lease := attempt(folder)) is None:
        if stop is not None:
            stop()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    try:
        yield lease
    finally:
        lease.release()


def owner(folder: Path) -> Owner | None:
    """Who holds a lease; None where nobody does, as far as is known here."""
    last = _highest(folder)
    found = _owner(folder / str(last)) if last else None
    return None if found is None or found.is_gone else found


def is_released(folder: Path) -> bool:
    """Whether nobody has it because it was given back, or never taken."""
    last = _highest(folder)
    content = _content(folder / str(last)) if last else _RELEASED
    return content is not None and content.startswith(_RELEASED)


def seconds() -> float:
    """How long an owner of another machine may be silent."""
    return float(os.environ.get(SECONDS, "60"))


# --- files ---------------------------------------------------------------------------------------


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]  # noqa: PTH208
    except FileNotFoundError:
        return []


def _highest(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _create(file: Path, content: bytes) -> None:
    """Create a file that must not exist; nothing is left of it when the disk is full."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as opened:
            opened.write(content)
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _overwrite(file: Path, content: bytes) -> None:
    """Replace the first bytes in place, which needs no room on the disk."""
    with file.open("rb+", buffering=0) as opened:
        opened.write(content)


def _owner(file: Path) -> Owner | None:
    """Who is written in a file; None: released, gone, or its owner is not written yet."""
    try:
        return codec.loads(Owner, (_content(file) or b"").partition(b"\n")[0])
    except codec.InvalidValue:
        return None


def _content(file: Path) -> bytes | None:
    """None: it changes hands right now, and its file is gone."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # removed on another machine while it was read
            return None
        raise


_SEEN: dict[Path, tuple[tuple[int, int], float]] = {}  # file -> its size and time, and since when


def _is_free(file: Path) -> bool:
    """Whether the owner of the highest file gave it back or is dead."""
    content = _content(file)  # first: to open it brings what is known of it up to date
    try:
        stat = file.stat()
    except OSError:
        return False
    if content is None:
        return False
    if content.startswith(_RELEASED):
        _SEEN.pop(file, None)
        return True
    found = _owner(file)
    if found is not None and found.is_here:
        return found.is_gone
    state, now = (stat.st_size, stat.st_mtime_ns), time.monotonic()
    seen, since = _SEEN.setdefault(file, (state, now))
    if seen != state:
        _SEEN[file] = (state, now)
        return False
    return now - since > seconds()


# --- the heartbeat -------------------------------------------------------------------------------


class _Pulse:
    """One thread a process that beats for all of its leases."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        os.register_at_fork(after_in_child=self._forget)

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()

    def remove(self, lease: Lease) -> None:
        with self._lock:
            self._leases.discard(lease)

    def _run(self) -> None:
        while True:
            time.sleep(seconds() / 10)
            with self._lock:
                leases = list(self._leases)
            for lease in leases:
                lease.beat()

    def _forget(self) -> None:
        """A forked child holds nothing of its parent's."""
        self._leases, self._lock, self._thread = set(), threading.Lock(), None


_PULSE = _Pulse()
