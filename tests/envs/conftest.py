"""A small environment of the user's own: a lock, a recipe and a wheel, all made on the spot."""

from __future__ import annotations

import io
import site
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qgrid import device, environment
from qgrid.envs import construct, locks, recipes
from qgrid.envs.builds import Build
from qgrid.envs.recipes import Recipe
from qgrid.envs.screen import Screen
from qgrid.planning import facts

NAME = "small"
KIND = device.describe().kind
ALL_PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
RECIPE = """\
python = {python}
first = {first}
told = ["qgrid-small"]
[variables]
QGRID_SMALL = "from the recipe"
[{kind}]
gib = {gib}
minutes = 1
modules = ["qgrid_small"]
check = "{check}"
stubs = {{small-stub = "3.0+cpu"}}
"""


def write_wheel(folder: Path, version: str) -> None:
    """A wheel of one module; its `.pth` lets the environment import what pytest's can."""
    info = f"qgrid_small-{version}.dist-info"
    content = {
        "qgrid_small.py": f"VERSION = {version!r}\n",
        "qgrid_small.pth": "".join(f"{path}\n" for path in site.getsitepackages()),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: qgrid-small\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"qgrid_small-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in {**content, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)


def forget() -> None:
    """Nothing of another test's recipes is remembered."""
    for known in (locks.pins, recipes.recipe, environment.locked_versions, facts.missing):
        known.cache_clear()
    environment._versions_of.cache_clear()


Write = Callable[..., Recipe]


def writing(folder: Path, patch: pytest.MonkeyPatch) -> Write:
    """Write the recipe and the lock, with changes, and read them: `write(version="2.0")`."""
    wheels, own = folder / "wheels", folder / "own"
    for each in (wheels, own):
        each.mkdir()
    patch.setenv("QGRID_ENVS", str(folder / "envs"))
    patch.setenv(locks.OWN, str(own))
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheels))
    patch.delenv("TORCH_ARGS", raising=False)

    def one(
        version: str = "1.0",
        check: str = "assert qgrid_small.VERSION",
        made: bool = True,
        **changes: object,
    ) -> Recipe:
        if made:
            write_wheel(wheels, version)
        values: dict[str, object] = {
            "python": ALL_PYTHONS,
            "first": [],
            "gib": 0.01,
            "check": check,
            "kind": KIND,
        }
        (own / f"{NAME}.toml").write_text(RECIPE.format(**(values | changes)))
        (own / f"{NAME}.txt").write_text(f"# of a test\nqgrid-small=={version}\n")
        forget()
        return recipes.recipe(NAME, KIND)

    return one


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Recipes of the test's own, in a folder of environments of its own."""
    yield writing(tmp_path, monkeypatch)
    forget()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """The small environment, built once for the tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        recipe = writing(tmp_path_factory.mktemp("built"), patch)()
        yield construct.build(recipe, (), Screen(io.StringIO()))[0]
    forget()
