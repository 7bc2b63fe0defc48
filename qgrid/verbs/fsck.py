"""`python -m qgrid fsck`: check the store and mend it (docs/store.md)."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qgrid import commands
from qgrid.store import abandoned, leases, needs, subjects
from qgrid.store.aside import set_aside
from qgrid.store.checks import Fault, Remedy
from qgrid.store.place import store_of
from qgrid.store.subjects import Subject

USAGE = "[out=FOLDER] [--dry-run] [--full]"
DONE: dict[Remedy, str] = {"set aside": "set aside", "remove": "removed", "put back": "put back"}
SHARED = ("artifacts", "quality results")  # cells read them under no lease of their own
COUNTED = ("records", "artifacts", "quality results", "plans")


def main(arguments: list[str]) -> int:
    """Check the store of `out=`; `--full` reads every byte, `--dry-run` changes nothing.

    Returns:
        0 when it is sound or mended; 1 when something is left, or would be mended.
    """
    given = commands.parse("fsck", arguments, USAGE, ("--dry-run", "--full"), names=0)
    store = store_of(given)
    check = _Check(store, dry="--dry-run" in given.flags)
    check.leases()
    for subject in subjects.every(store, full="--full" in given.flags):
        check.look(subject)
    return check.verdict()


class _Check:
    """One pass over a store: what was looked at, mended, and left for the user."""

    def __init__(self, store: Path, dry: bool) -> None:
        self._store = store
        self._dry = dry
        self._seen: Counter[str] = Counter()
        self._mended = 0
        self._left = 0

    def leases(self) -> None:
        """Give back what dead owners hold, so that nobody waits for them."""
        taken = abandoned.taken(self._store)
        silent = []
        for folder in taken:
            with self._spared(folder):
                if abandoned.is_known_dead(folder) and (self._dry or abandoned.give_back(folder)):
                    self._mend(folder, "given back", "its owner ended")
                elif not _is_here(folder):
                    silent.append(folder)
        if not self._dry:
            with self._spared(self._store / "leases"):
                for folder in abandoned.watch(silent, _say):
                    self._mend(folder, "given back", "its owner gave no sign of life")

    def look(self, subject: Subject) -> None:
        """Check one thing, and mend it where that can be done."""
        self._seen[subject.kind] += 1
        fault = subject.fault()
        if fault is None:
            return
        if fault.remedy == "leave":
            self._leave(subject.path, fault.text)
            return
        with self._spared(subject.path), self._owned(subject, fault) as is_owned:
            fault = subject.fault() if is_owned else None  # it may have been replaced meanwhile
            if fault is not None:
                self._treat(subject.path, fault)

    def verdict(self) -> int:
        """Say what it came to; the exit code."""
        looked = ", ".join(f"{self._seen[kind]} {kind}" for kind in COUNTED)
        mended = f"{self._mended} {'would be ' if self._dry else ''}mended"
        said = f"{mended}, {self._left} left" if self._mended or self._left else "sound"
        _say(f"{looked}: {said}")
        return 1 if self._left or (self._dry and self._mended) else 0

    def _treat(self, path: Path, fault: Fault) -> None:
        """Carry out a remedy."""
        where = ""
        if fault.remedy == "leave":
            self._leave(path, fault.text)
            return
        if self._dry:
            pass
        elif fault.remedy == "set aside":
            where = f" (now {set_aside(self._store, path).relative_to(self._store)})"
        elif fault.remedy == "put back":
            path.rename(subjects.target_of(path))
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        self._mend(path, DONE[fault.remedy], f"{fault.text}{where}")

    @contextlib.contextmanager
    def _owned(self, subject: Subject, fault: Fault) -> Iterator[bool]:
        """Hold the lease of a subject, if it has one; whether that was possible."""
        if subject.kind in SHARED and subject.path.name in needs.at_work(self._store):
            self._leave(subject.path, f"{fault.text}; a cell at work uses it: try again later")
            yield False
        elif subject.lease is None or (self._dry and leases.owner(subject.lease) is None):
            yield True
        elif self._dry or (lease := leases.attempt(subject.lease)) is None:
            if fault.remedy != "remove":  # what is being written is no fault
                self._leave(subject.path, f"{fault.text}; it is being worked on: try again later")
            yield False
        else:
            try:
                yield True
            finally:
                lease.release()

    @contextlib.contextmanager
    def _spared(self, path: Path) -> Iterator[None]:
        """A store that cannot be written to is left as it is, with the reason."""
        try:
            yield
        except OSError as error:
            self._leave(path, f"cannot be mended: {error.strerror}")

    def _mend(self, path: Path, deed: str, why: str) -> None:
        self._mended += 1
        self._tell(f"would be {deed}" if self._dry else deed, path, why)

    def _leave(self, path: Path, why: str) -> None:
        self._left += 1
        self._tell("left", path, why)

    def _tell(self, deed: str, path: Path, why: str) -> None:
        _say(f"{deed} {path.relative_to(self._store)}: {why}")


def _is_here(folder: Path) -> bool:
    """Whether a lease is held by a process of this machine."""
    owner = leases.owner(folder)
    return owner is not None and owner.is_here


def _say(sentence: str) -> None:
    print(" ".join(sentence.split()), flush=True)  # noqa: T201
