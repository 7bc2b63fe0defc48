"""What is not here as a lock says, by name: versions, pins, files, device. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qgrid import device, environment, registry
from qgrid.reproduction.lock import SEEN, Hashes, Inputs, Lock, LockedCell, is_described
from qgrid.types import Gpu, PlannedCell

_SINGLE = ("qgrid", "python", "os", "cuda", "driver")
_MACHINE = ("machine", "cpu", "cpu_flags", "cores", "memory_gib", "gpus")
_SHOWN = 12  # characters of a hash
_GROUPS = {"models": "model", "methods": "method", "calibrations": "calibration"}


@dataclass(frozen=True)
class Difference:
    """One thing that is another one here; `old` and `new` are None where it is not there."""

    what: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        """`what: old -> new`."""
        old, new = ("absent" if each is None else each for each in (self.old, self.new))
        return f"{self.what}: {old} -> {new}"


@dataclass(frozen=True)
class Here:
    """This machine and installation, and the contents of what the lock names."""

    seen: Mapping[str, Any]  # as one of a lock's `environments`
    commit: str | None  # of qgrid's checkout
    pins: Mapping[str, Mapping[str, str]]
    inputs: Inputs
    planned: Mapping[str, PlannedCell]  # by the locked cell's id; empty: not all is there


def look(lock: Lock, inputs: Inputs, planned: Mapping[str, PlannedCell], pins: Any) -> Here:
    """What is here of what the lock names."""
    known = environment.provenance()
    seen = {key: known[key] for key in SEEN}
    elsewhere = {
        name: {"versions": _installed(each)}
        for locked in lock.environments.values()
        for name, each in locked.get("elsewhere", {}).items()
    }
    return Here({**seen, "elsewhere": elsewhere}, known["git_commit"], pins, inputs, planned)


def _installed(locked: Mapping[str, Any]) -> dict[str, str]:
    name = str(locked["environment"])
    return environment.installed(locked["versions"], name, environment.kind_here(name))


def between(lock: Lock, here: Here) -> list[Difference]:
    """Everything that differs, versions first."""
    found = [
        *_environments(lock, here.seen),
        *_pins(lock.pins, here.pins),
        *_contents(lock.inputs, here.inputs),
        *_devices(lock),
        *_plan(lock, here.planned),
    ]
    return found or list(_identities(here.planned))


def remarks(lock: Lock, here: Here) -> list[str]:
    """What a reader should know that makes no number another one."""
    found = []
    if lock.commits and (here.commit,) != lock.commits:
        found.append(f"qgrid's commit was {', '.join(lock.commits)} and is {here.commit}")
    if lock.changed:
        found.append(
            f"inputs of {len(lock.changed)} cells were altered after these were planned, so that "
            "the lock's hashes are not of what was measured"
        )
    bare = sum(each.status is None for each in lock.cells.values())
    if bare:
        found.append(f"{bare} cells have no results in the lock; they are run, not compared")
    return found + [
        f"model `{name}` is not on this machine yet; it is fetched when a cell needs it"
        for name, hashes in here.inputs.models.items()
        if not hashes and "commit" in lock.inputs.models.get(name, {})
    ]


def _environments(lock: Lock, now: Mapping[str, Any]) -> list[Difference]:
    """Against every environment that cells were measured in; what some of them had is counted."""
    cells = [each.environment for each in lock.cells.values() if each.environment is not None]
    found: dict[Difference, int] = {}
    for name, locked in lock.environments.items():
        for difference in _versions(locked, now):
            found[difference] = found.get(difference, 0) + cells.count(name)
    return [
        each if n == len(cells) else replace(each, what=f"{each.what} ({n} of {len(cells)} cells)")
        for each, n in found.items()
    ]


def _versions(locked: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for key in (*_SINGLE, *_MACHINE):
        if key in locked and locked[key] != now[key]:
            yield _other(key, locked[key], now[key])
    yield from _each("{}", locked.get("versions", {}), now["versions"])
    threads = (
        {key: str(n) for key, n in each.get("threads", {}).items()} for each in (locked, now)
    )
    yield from _each("{} (threads)", *threads)
    for name, each in locked.get("elsewhere", {}).items():
        known = now["elsewhere"].get(name, {}).get("versions", {})
        yield from _each(f"{{}} (in the environment `{name}`)", each["versions"], known)


def _other(key: str, old: Any, new: Any) -> Difference:
    """A single value; of two lists only what is in one of them."""
    if isinstance(old, list) and isinstance(new, list):
        gone = ", ".join(str(each) for each in old if each not in new)
        more = ", ".join(str(each) for each in new if each not in old)
        return Difference(key, gone or "-", more or "-")
    return Difference(key, *(None if each is None else str(each) for each in (old, new)))


def _pins(locked: Mapping[str, Mapping[str, str]], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name, pins in locked.items():
        yield from _each(f"{{}} (pinned in `{name}`)", pins, now.get(name, {}))


def _each(what: str, locked: Hashes, now: Hashes) -> Iterator[Difference]:
    """Entries of two mappings that differ; `what` has a place for the key."""
    for key in dict.fromkeys([*locked, *now]):
        if locked.get(key) != now.get(key):
            yield Difference(what.format(key), locked.get(key), now.get(key))


def _contents(locked: Inputs, now: Inputs) -> Iterator[Difference]:
    """Files by their hashes; what is in neither is a hub's and not on this machine yet."""
    for group, kind in _GROUPS.items():
        known: Mapping[str, Hashes] = getattr(now, group)
        for name, hashes in getattr(locked, group).items():
            if hashes and known.get(name):
                yield from map(_short, _each(f"`{{}}` of {kind} `{name}`", hashes, known[name]))
    for name, hashes in locked.slices.items():
        there = now.slices.get(name, {})
        for each in _each("{}", hashes, there):
            of = "prose" if each.what == "prose" else f"slice `{each.what.removeprefix('items.')}`"
            yield _short(replace(each, what=f"{of} of slices `{name}`"))


def _short(found: Difference) -> Difference:
    old, new = (None if each is None else each[:_SHOWN] for each in (found.old, found.new))
    return replace(found, old=old, new=new)


def _devices(lock: Lock) -> Iterator[Difference]:
    """Devices that cells were planned for, where this machine is another one."""
    machine = device.describe()
    used = {
        each.cell.gpu: None
        for each in lock.cells.values()
        if not registry.runtime(lock.parts.runtimes[each.cell.runtime].name).LOADS.remote
    }
    for name in used:
        gpu = lock.parts.gpus[name]
        if is_elsewhere(gpu, machine):
            yield Difference("device", name, machine.name)


def is_elsewhere(planned: Gpu, machine: Gpu) -> bool:
    """Whether a machine is another one than that which a cell was planned for."""
    if is_described(planned):
        return planned != machine
    return not device.matches(planned, machine)


def _plan(lock: Lock, planned: Mapping[str, PlannedCell]) -> Iterator[Difference]:
    """Cells that are refused here, or no longer."""
    for cell_id, each in planned.items():
        old = lock.cells[cell_id]
        if each.status is not None and old.status != each.status:
            yield Difference(_called(old), old.status, f"{each.status}: {each.reason}")
        elif each.status is None and old.status in {"unsupported", "does_not_fit"}:
            yield Difference(_called(old), old.status, "can run")


def _called(cell: LockedCell) -> str:
    made = cell.cell
    return f"cell {made.model} {made.method} {made.bits}-bit on {made.runtime}"


def _identities(planned: Mapping[str, PlannedCell]) -> Iterator[Difference]:
    """Where nothing else differs: the rules that make identities do."""
    others = sum(each.cell_id != cell_id for cell_id, each in planned.items())
    if others:
        yield Difference(f"identities of {others} cells", "the lock's", "made by other rules here")
