"""The python of each environment, and what it sees of this one: `qgrid` and a user's plugins."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import qgrid
from qgrid import device, environment
from qgrid.envs import builds, locks, recipes
from qgrid.types import DeviceKind

GROUPS = ("qgrid.methods", "qgrid.runtimes")  # of entry points, see `registry`


class UnknownInterpreter(ValueError):
    """An environment that has no interpreter on this machine."""


def interpreter(name: str, kind: DeviceKind | None = None) -> str:
    """The python of an environment, for a kind of device or for this machine's.

    Raises:
        UnknownInterpreter: nobody has built it here; the message has the command that does.
    """
    if name == recipes.MAIN:
        return sys.executable
    return str(_build(_recipe(name, kind)).interpreter)


def variables(name: str, shown: Path | None, kind: DeviceKind | None = None) -> dict[str, str]:
    """The environment variables of a worker, with qgrid importable.

    `shown` is an empty folder in which another interpreter than this one finds qgrid and the user's
    plugins, and nothing else that is installed here; the main environment needs none.

    Raises:
        UnknownInterpreter: see `interpreter`.
    """
    told = {environment.NAME: name}
    if name != recipes.MAIN:
        assert shown is not None
        recipe = _recipe(name, kind)
        _show(shown)
        return {**builds.variables(recipe), **told, "PYTHONPATH": str(shown)}
    root = str(Path(qgrid.__file__).parents[1])
    if "site-packages" in root:
        return {**os.environ, **told}
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, **told, "PYTHONPATH": path}


def _recipe(name: str, kind: DeviceKind | None) -> recipes.Recipe:
    try:
        return recipes.recipe(name, device.describe().kind if kind is None else kind)
    except locks.UnknownEnvironment as error:
        raise UnknownInterpreter(str(error)) from None


def _build(recipe: recipes.Recipe) -> builds.Build:
    found = builds.find(recipe)
    if found is None:
        raise UnknownInterpreter(
            f"environment `{recipe.environment}` is not built on this machine; "
            f"run `{builds.command(recipe)}`"
        )
    return found


def _show(folder: Path) -> None:
    """Link qgrid and the modules of a user's plugins into `folder`, with their entry points."""
    _link(folder / "qgrid", Path(qgrid.__file__).parent)
    lines = []
    for group in GROUPS:
        points = entry_points(group=group)
        lines += [f"[{group}]", *(f"{point.name} = {point.value}" for point in points)]
        for point in points:
            _show_module(folder, point)
    told = folder / "qgrid_plugins-1.dist-info"
    told.mkdir(exist_ok=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: qgrid-plugins\nVersion: 1\n")
    (told / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _show_module(folder: Path, point: EntryPoint) -> None:
    """Link the top-level package or module that an entry point is in; one that is gone is not."""
    name = point.module.partition(".")[0]
    spec = find_spec(name)
    if spec is None:
        return
    if spec.submodule_search_locations:
        _link(folder / name, Path(spec.submodule_search_locations[0]))
    elif spec.origin is not None:
        _link(folder / Path(spec.origin).name, Path(spec.origin))


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target.absolute())
