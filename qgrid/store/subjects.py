"""What `fsck` looks at: every file and folder of the store, with its check and its lease."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qgrid import files
from qgrid.store import checks, leases, records
from qgrid.store.checks import Broken, Fault

_ASIDE = re.compile(r"\.(?P<name>.+)\.(?:[a-z0-9_]{8}|old)")  # as `files` names what it writes
_ASIDE_SECONDS = 600.0  # how long a file that no lease guards may be under way


@dataclass(frozen=True)
class Subject:
    """Something that can be wrong. `lease`: its holder is at work there; None: nobody holds it."""

    kind: str  # in the plural, for the count
    path: Path
    lease: Path | None
    check: Callable[[], Fault | None]

    def fault(self) -> Fault | None:
        """What is wrong with it now; nothing where it has gone meanwhile."""
        try:
            return self.check()
        except Broken as error:
            return Fault(str(error), "set aside")
        except FileNotFoundError:
            return None
        except OSError as error:
            return Fault(f"cannot be read: {error.strerror}", "leave")


def every(store: Path, full: bool) -> Iterator[Subject]:
    """All subjects of a store, what is unfinished first; `full`: artifacts by every byte."""
    yield from leftovers(store)
    for folder in _folders(store / "cells"):
        lease = leases.of(store, "cells", folder.name)
        record = records.path(store, folder.name)
        yield from _file("records", record, lease, checks.record)
        timing = folder / "speed" / "result.json"
        yield from _file("stage results", timing, lease, checks.stage_result)
    for folder in _folders(store / "builds"):
        lease = leases.of(store, "artifacts", folder.name)
        yield from _file("stage results", folder / "result.json", lease, checks.stage_result)
    for folder in _folders(store / "artifacts"):
        check = functools.partial(checks.artifact, folder, full)
        yield Subject("artifacts", folder, leases.of(store, "artifacts", folder.name), check)
    for folder in _folders(store / "quality"):
        check = functools.partial(checks.quality, folder)
        yield Subject("quality results", folder, leases.of(store, "quality", folder.name), check)
    for folder in _folders(store / "sweeps"):
        lease = leases.of(store, "sweeps", folder.name)
        yield from _file("plans", folder / "plan.jsonl", lease, checks.plan)
        yield from _file("settings", folder / "settings.json", lease, checks.settings)
        yield from _file("settings", folder / "launcher.json", lease, checks.launcher)
    yield from _file("hash caches", store / "hashes.json", None, checks.hashes)


def leftovers(store: Path) -> Iterator[Subject]:
    """What was being written when its process ended: beside the files and folders it was for."""
    for folder in _folders(store / "cells"):
        lease = leases.of(store, "cells", folder.name)
        for place in (folder, *_folders(folder)):
            yield from _asides(place, lease)
    for folder in _folders(store / "builds"):
        yield from _asides(folder, leases.of(store, "artifacts", folder.name))
    for folder in _folders(store / "quality"):
        yield from _asides(folder, leases.of(store, "quality", folder.name))
    for path in _aside(store / "artifacts"):
        yield _leftover(path, leases.of(store, "artifacts", target_of(path).name))
    for path in _anywhere(store / "sweeps"):
        yield _unguarded(path)
    for path in _aside(store):
        yield _unguarded(path)


def _file(
    kind: str, file: Path, lease: Path | None, check: Callable[[Path], Fault | None]
) -> Iterator[Subject]:
    if file.exists():
        yield Subject(kind, file, lease, functools.partial(check, file))


def _folders(root: Path) -> list[Path]:
    """The folders of a folder, hidden ones left out, in order."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.is_dir())


def _aside(folder: Path) -> Iterable[Path]:
    """What `files` writes beside its target before it is whole, or lays there."""
    return (path for path in sorted(folder.glob(".*")) if _ASIDE.fullmatch(path.name))


def target_of(aside: Path) -> Path:
    """What a file or folder that lies aside was to become, or was."""
    found = _ASIDE.fullmatch(aside.name)
    assert found is not None
    return aside.with_name(found["name"])


def _asides(folder: Path, lease: Path) -> Iterator[Subject]:
    for path in _aside(folder):
        yield _leftover(path, lease)


def _anywhere(root: Path) -> Iterable[Path]:
    return (path for path in sorted(root.rglob(".*")) if _ASIDE.fullmatch(path.name))


def _leftover(path: Path, lease: Path) -> Subject:
    def check() -> Fault:
        target = target_of(path)
        if path == files.before(target) and not target.exists():
            return Fault("was to be replaced by a process that ended", "put back")
        return Fault("was left by a process that ended", "remove")

    return Subject("unfinished files", path, lease, check)


def _unguarded(path: Path) -> Subject:
    """Where no lease says who writes: what is older than any writing takes."""

    def check() -> Fault | None:
        is_old = _now(path.parent) - path.stat().st_mtime > _ASIDE_SECONDS
        return Fault("was left by a process that ended", "remove") if is_old else None

    return Subject("unfinished files", path, None, check)


def _now(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder: that of its server, if it has one.

    In a folder that cannot be written to, where nothing could be removed either, it is long ago.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0
