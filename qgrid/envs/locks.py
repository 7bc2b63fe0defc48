"""The locks: one text file for an environment, or one for each kind of device that it runs on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from qgrid.types import DeviceKind

LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;#]+)")


OWN = "QGRID_RECIPES"  # variable: a folder with recipes and locks of the user's own


class UnknownEnvironment(ValueError):
    """An environment that has no lock file in `qgrid/envs/`."""


def folders() -> list[Traversable]:
    """Where recipes and locks lie: with qgrid, and in the user's own folder if there is one."""
    own = os.environ.get(OWN)
    return [files("qgrid.envs"), *([Path(own)] if own else [])]


def named(suffix: str) -> dict[str, Traversable]:
    """The files of this suffix by their stem, qgrid's own first."""
    found = [file for folder in folders() if folder.is_dir() for file in folder.iterdir()]
    chosen = [file for file in reversed(found) if file.name.endswith(suffix)]
    return {file.name.removesuffix(suffix): file for file in chosen}


def lock_name(environment: str, kind: DeviceKind) -> str:
    """The lock of an environment: its own, or the one for a kind of device (`NAME-cpu`)."""
    return environment if environment in named(".txt") else f"{environment}-{kind}"


@cache
def pins(environment: str, kind: DeviceKind) -> Mapping[str, str]:
    """Distribution -> version, as the lock of an environment writes them.

    Raises:
        UnknownEnvironment: no such lock; the message lists the known ones.
    """
    known = named(".txt")
    lock = known.get(lock_name(environment, kind))
    if lock is None:
        raise UnknownEnvironment(
            f"environment `{environment}` has no lock in qgrid/envs (has: "
            f"{', '.join(sorted(known))})"
        )
    lines = map(LINE.match, lock.read_text(encoding="utf-8").splitlines())
    return {line["name"]: line["version"] for line in lines if line}


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it: `Foo_Bar` is `foo-bar`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same(installed: str, locked: str) -> bool:
    """Whether a version is the locked one; a local build tag (`2.13.0+cpu`) is no difference."""
    return installed.partition("+")[0] == locked.partition("+")[0]


def deviations(pins: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """What is not as locked among installed versions: `NAME 2 (locked 1)`."""
    return [
        f"{name} {versions[name]} (locked {pinned})"
        for name, pinned in pins.items()
        if not same(versions[name], pinned)
    ]
