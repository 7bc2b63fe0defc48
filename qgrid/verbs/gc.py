"""`python -m qgrid gc`: free the artifacts that no record and no plan needs (docs/store.md)."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qgrid import commands
from qgrid.store import leases, needs
from qgrid.store.place import store_of

USAGE = "[out=FOLDER] [--dry-run]"
UNITS = ("bytes", "KiB", "MiB", "GiB")


def main(arguments: list[str]) -> int:
    """Free what nobody needs in the store of `out=`; `--dry-run` only says what that is.

    Returns:
        0; 1 when something could not be freed, or nobody can tell what is needed.
    """
    given = commands.parse("gc", arguments, USAGE, ("--dry-run",), names=0)
    try:
        return _Collection(store_of(given), dry="--dry-run" in given.flags).run()
    except needs.Unknown as error:
        _say(f"nothing was freed: {error}")
        return 1


class _Collection:
    """One pass over the artifacts of a store."""

    def __init__(self, store: Path, dry: bool) -> None:
        self._store = store
        self._dry = dry
        self._plans = _plans(store)
        self._needed = needs.artifacts(store)
        self._failed = False

    def run(self) -> int:
        """Free every artifact and every build folder that nobody needs."""
        found = sorted(_ids(self._store / "artifacts") | _ids(self._store / "builds"))
        kept = [each for each in found if each in self._needed]
        freed = [size for each in found if each not in kept for size in self._free(each)]
        verb = "would free" if self._dry else "freed"
        _say(f"{verb} {len(freed)} artifacts, {shown(sum(freed))}; {len(kept)} are needed")
        return 1 if self._failed else 0

    def _free(self, artifact_id: str) -> Iterator[int]:
        """Remove one artifact and what its build left; its size, if that was possible."""
        places = [self._store / part / artifact_id for part in ("artifacts", "builds")]
        size = sum(_size(place) for place in places)
        try:
            with self._owned(artifact_id) as refusal:
                if refusal is None and not self._dry:
                    for place in places:
                        _remove(place)
        except OSError as error:
            self._failed = True
            refusal = f"cannot be freed: {error.strerror}"
        if refusal is not None:
            _say(f"kept {artifact_id}, {shown(size)}: {refusal}")
            return
        _say(f"{'would free' if self._dry else 'freed'} {artifact_id}, {shown(size)}")
        yield size

    @contextmanager
    def _owned(self, artifact_id: str) -> Iterator[str | None]:
        """Hold the lease of an artifact that still nobody needs; else why it must stay."""
        folder = leases.of(self._store, "artifacts", artifact_id)
        if self._dry:
            yield None if leases.owner(folder) is None else "it is being built"
            return
        lease = leases.attempt(folder)
        if lease is None:
            yield "it is being built"
            return
        try:
            yield self._needed_now(artifact_id)
        finally:
            lease.release()

    def _needed_now(self, artifact_id: str) -> str | None:
        """Who needs it, sweeps that were planned meanwhile included."""
        plans = _plans(self._store)
        if plans != self._plans:
            self._plans, self._needed = plans, needs.artifacts(self._store)
        by = self._needed.get(artifact_id)
        return None if by is None else f"{by} needs it"


def shown(size: int) -> str:
    """A size in bytes for people: `0 bytes`, `1.5 GiB`."""
    power = 0
    while power < len(UNITS) - 1 and size >= 1024 ** (power + 1):
        power += 1
    return f"{size / 1024**power:.1f} {UNITS[power]}" if power else f"{size} bytes"


def _ids(folder: Path) -> set[str]:
    """The names of the folders in a folder, hidden ones left out: those are under way."""
    if not folder.is_dir():
        return set()
    return {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}


def _plans(store: Path) -> dict[Path, tuple[int, int, int]]:
    """What changes when a sweep is planned."""
    stats = {plan: plan.stat() for plan in needs.plans(store)}
    return {plan: (s.st_mtime_ns, s.st_size, s.st_ino) for plan, s in stats.items()}


def _size(folder: Path) -> int:
    """Bytes of the files of a folder; a link to a file of the base model takes none."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _remove(folder: Path) -> None:
    """Out of its place in one step, so that nobody finds half of it."""
    if folder.is_dir():
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        folder.rename(aside)
        shutil.rmtree(aside)


def _say(sentence: str) -> None:
    print(" ".join(sentence.split()), flush=True)  # noqa: T201
