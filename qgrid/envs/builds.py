"""Where environments lie once they are built, outside the checkout; looked at without importing."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from qgrid import device
from qgrid.envs import locks
from qgrid.envs.recipes import Recipe
from qgrid.files import user_cache, write_atomic

PYTHON_VARIABLES = {"PYTHONPATH", "PYTHONHOME"}  # they would show it this interpreter's packages
MARKER = "qgrid.json"  # written last: a folder without it is half built


@dataclass(frozen=True)
class Build:
    """A whole environment. `bytes` is its size on disk, `seconds` what building it took."""

    folder: Path
    python: str
    bytes: int
    seconds: float

    @property
    def interpreter(self) -> Path:
        """Its python."""
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        """Where its packages lie."""
        major, minor = self.python.split(".")[:2]
        return self.folder / "lib" / f"python{major}.{minor}" / "site-packages"

    def versions(self) -> dict[str, str]:
        """Distribution -> version as installed, by normalized name; read from metadata alone."""
        found = distributions(path=[str(self.site)])
        return {locks.normalized(each.metadata["Name"]): each.version for each in found}


def home() -> Path:
    """The folder of all environments: `QGRID_ENVS`, else a place of the user's own."""
    return user_cache("QGRID_ENVS", "envs")


def folder_of(recipe: Recipe) -> Path:
    """Where the environment of this recipe lies, built or not."""
    return home() / recipe.key()


def find(recipe: Recipe) -> Build | None:
    """The whole environment of this very recipe; None: nobody has built it here."""
    folder = folder_of(recipe)
    try:
        told = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        build = Build(folder, told["python"], told["bytes"], told["seconds"])
    except (OSError, ValueError, KeyError):
        return None
    return build if build.interpreter.exists() else None  # its base may have been removed


def mark(build: Build, recipe: Recipe) -> None:
    """Say that a build is whole; the last thing that happens to it."""
    told = {
        "lock": recipe.lock,
        "python": build.python,
        "bytes": build.bytes,
        "seconds": build.seconds,
    }
    write_atomic(build.folder / MARKER, json.dumps(told, indent=1))


def others(recipe: Recipe) -> list[Path]:
    """Folders of the same lock that this recipe does not use: older, or of another Python."""
    mine = folder_of(recipe)
    return sorted(
        folder
        for folder in home().glob(f"{recipe.lock}-*")
        if folder.is_dir() and folder != mine and len(folder.name) == len(mine.name)
    )


def variables(recipe: Recipe) -> dict[str, str]:
    """This process's environment for an interpreter of the recipe: no packages but its own."""
    ours = {name: os.environ[name] for name in os.environ.keys() - PYTHON_VARIABLES}
    tools = os.pathsep.join([str(folder_of(recipe) / "bin"), ours.get("PATH", os.defpath)])
    return {**recipe.variables, **ours, "PATH": tools, "PYTHONSAFEPATH": "1"}


def remove(folder: Path) -> None:
    """Remove a build, its marker first, so that what is left never looks whole."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def command(recipe: Recipe) -> str:
    """What builds it, with the device where that is not this machine's."""
    here = device.describe().kind == recipe.kind
    return f"python -m qgrid setup {recipe.environment}{'' if here else f' --device {recipe.kind}'}"
