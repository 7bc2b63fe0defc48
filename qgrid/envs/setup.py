"""`python -m qgrid setup`: build an environment, or list all of them and their state."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from qgrid import device
from qgrid.envs import builds, construct, recipes
from qgrid.envs.builds import Build
from qgrid.envs.recipes import MAIN, Recipe
from qgrid.envs.screen import Screen
from qgrid.types import DeviceKind

FIRST_ARGS = "TORCH_ARGS"  # pip's arguments for torch, here as in the Makefile


class WrongSetup(ValueError):
    """A command line that `setup` does not understand."""


@dataclass(frozen=True)
class Wanted:
    """What a command line asks for; `environment` is None for the list."""

    environment: str | None
    kind: DeviceKind
    prune: bool
    first_args: tuple[str, ...]


def main(arguments: Sequence[str], screen: Screen | None = None) -> int:
    """Build what is asked for, or print the list.

    Raises:
        WrongSetup: the command line cannot be understood.
        construct.NotBuilt: it could not be built.
        locks.UnknownEnvironment: there is no such environment.
    """
    wanted = parsed(arguments)
    if wanted.environment is None:
        sys.stdout.write("".join(f"{line}\n" for line in listed(wanted.kind)))
        return 0
    if wanted.environment == MAIN:
        raise WrongSetup("`main` is the environment that qgrid itself runs in; it is built")
    recipe = recipes.recipe(wanted.environment, wanted.kind)
    screen = Screen() if screen is None else screen
    _build(recipe, wanted.first_args, screen)
    _tell_others(recipe, wanted.prune, screen)
    return 0


def parsed(arguments: Sequence[str]) -> Wanted:
    """The command line `[NAME] [--device cpu|cuda] [--prune] [-- ARGUMENTS OF PIP FOR TORCH]`.

    Raises:
        WrongSetup: it is none.
    """
    own = list(arguments)
    first_args = shlex.split(os.environ.get(FIRST_ARGS, ""))
    if "--" in own:
        place = own.index("--")
        own, first_args = own[:place], own[place + 1 :]
    kind: str | None = None
    if "--device" in own:
        place = own.index("--device")
        kind = own[place + 1] if place + 1 < len(own) else None
        if kind not in get_args(DeviceKind):
            raise WrongSetup(f"`--device` is {' or '.join(get_args(DeviceKind))}, got `{kind}`")
        del own[place : place + 2]
    names = [argument for argument in own if not argument.startswith("-")]
    if len(names) > 1 or set(own) - {*names, "--prune"}:
        raise WrongSetup(
            "`qgrid setup` takes [NAME] [--device cpu|cuda] [--prune] [-- ARGUMENTS OF PIP], "
            f"got `{' '.join(arguments)}`"
        )
    chosen = device.describe().kind if kind is None else cast("DeviceKind", kind)
    return Wanted(names[0] if names else None, chosen, "--prune" in own, tuple(first_args))


def listed(kind: DeviceKind) -> Iterator[str]:
    """A line for each environment: its lock and its state."""
    yield f"{'environment':<14}{'device':<8}{'lock':<12}state"
    python = sys.version.split()[0]
    yield f"{MAIN:<14}{'any':<8}{MAIN:<12}in use: {sys.executable} ({python})"
    for name in recipes.names():
        recipe = recipes.recipe(name, kind)
        found = builds.find(recipe)
        state = f"not built; run `{builds.command(recipe)}`"
        if found is not None:
            state = f"built: {found.interpreter} ({found.python}), {_gib(found.bytes)}"
        yield f"{name:<14}{kind:<8}{recipe.lock:<12}{state}"


def _build(recipe: Recipe, first_args: Sequence[str], screen: Screen) -> Build:
    found = builds.find(recipe)
    if found is None:
        screen.say(
            f"building `{recipe.environment}` for {recipe.kind} from {recipe.lock}.txt: "
            f"{len(recipe.pins)} packages, about {recipe.gib:g} GiB, {recipe.minutes:g} minutes"
        )
    build, now = construct.build(recipe, first_args, screen)
    how = f"built in {build.seconds:.0f} s" if now else "built before; its lock has not changed"
    screen.say(f"`{recipe.environment}` is ready: {build.interpreter}, {_gib(build.bytes)}, {how}")
    return build


def _tell_others(recipe: Recipe, prune: bool, screen: Screen) -> None:
    """Builds of earlier locks: counted, or removed."""
    others = builds.others(recipe)
    if prune:
        for folder in others:
            builds.remove(folder)
        screen.say(f"{len(others)} earlier builds removed")
    elif others:
        screen.say(
            f"{len(others)} earlier builds are kept in {builds.home()}; "
            f"`python -m qgrid setup {recipe.environment} --prune` removes them"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
