"""How each environment besides the main one is built: `NAME.toml` beside its locks."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from qgrid.envs import locks
from qgrid.types import DeviceKind

MAIN = "main"  # the environment that qgrid itself is installed in


@dataclass(frozen=True)
class Recipe:
    """One environment on one kind of device."""

    environment: str
    kind: DeviceKind
    lock: str  # name of the lock file
    pins: Mapping[str, str]  # distribution -> version, installed without dependencies
    first: tuple[str, ...]  # of these, what is installed before the rest, with the user's arguments
    stubs: Mapping[str, str]  # distributions of metadata only: name -> version
    modules: tuple[str, ...]  # that must be importable
    check: str  # a Python statement that must hold after these imports
    variables: Mapping[str, str]  # for its interpreters
    python: tuple[str, ...]  # versions that the lock is for
    told: tuple[str, ...]  # distributions that `doctor` names
    gib: float  # size on disk
    minutes: float  # to build, roughly

    def contents(self) -> dict[str, str]:
        """Everything that is installed: distribution -> version."""
        return {**self.pins, **self.stubs}

    def key(self) -> str:
        """The folder of a build: the lock's name, and a hash of all that decides its content."""
        parts = [
            dict(self.pins),
            dict(self.stubs),
            [sys.implementation.cache_tag, sys.platform, platform.machine()],
        ]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return f"{self.lock}-{digest[:16]}"


def names() -> tuple[str, ...]:
    """The environments that have a recipe."""
    return tuple(sorted(locks.named(".toml")))


@cache
def recipe(environment: str, kind: DeviceKind) -> Recipe:
    """The recipe of an environment on a kind of device.

    Raises:
        locks.UnknownEnvironment: there is none; the message lists the known ones.
    """
    file = locks.named(".toml").get(environment)
    if file is None:
        known = ", ".join(names())
        raise locks.UnknownEnvironment(f"no environment `{environment}` to build (has: {known})")
    told = tomllib.loads(file.read_text(encoding="utf-8"))
    if kind not in told:
        raise locks.UnknownEnvironment(f"environment `{environment}` has no recipe for {kind}")
    mine = told[kind]
    return Recipe(
        environment=environment,
        kind=kind,
        lock=locks.lock_name(environment, kind),
        pins=locks.pins(environment, kind),
        first=tuple(told["first"]),
        stubs=mine["stubs"],
        modules=tuple(mine["modules"]),
        check=mine["check"],
        variables=told["variables"],
        python=tuple(told["python"]),
        told=tuple(told["told"]),
        gib=float(mine["gib"]),
        minutes=float(mine["minutes"]),
    )
