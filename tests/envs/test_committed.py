"""The committed environments as they are built on this machine, against their locks."""

from __future__ import annotations

import subprocess

import pytest

from qgrid import device, environment
from qgrid.envs import builds, locks, recipes
from qgrid.envs.builds import Build
from qgrid.envs.recipes import Recipe

Found = tuple[Recipe, Build]


@pytest.fixture(params=recipes.names())
def found(request: pytest.FixtureRequest) -> Found:
    recipe = recipes.recipe(request.param, device.describe().kind)
    build = builds.find(recipe)
    if build is None:
        pytest.skip(f"needs `{builds.command(recipe)}`, which `make test` runs")
    return recipe, build


def test_a_built_environment_holds_what_its_lock_says(found: Found) -> None:
    recipe, build = found
    versions = build.versions()
    pins = recipe.contents()
    assert len(pins) > 50
    installed = {name: versions[locks.normalized(name)] for name in pins}
    assert locks.deviations(pins, installed) == []
    more = versions.keys() - {locks.normalized(name) for name in pins}
    assert more <= {"pip"}  # of `venv`


@pytest.mark.slow
def test_a_built_environment_imports_what_it_is_for(found: Found) -> None:
    recipe, build = found
    code = "".join(f"import {module}\n" for module in recipe.modules) + recipe.check
    command = [str(build.interpreter), "-I", "-c", code]
    done = subprocess.run(
        command, env=builds.variables(recipe), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_worker_of_it_can_import_every_stage_and_needs_nothing_of_the_main_one(
    found: Found, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from qgrid.running import interpreters

    recipe, build = found
    main_only = ("hydra", "omegaconf", "wandb", "plotly", "llmcompressor", "datasets")
    code = (
        "import importlib, pkgutil, sys, qgrid\n"
        f"for name in {main_only}: sys.modules[name] = None\n"
        "from qgrid.running import worker, preload\n"
        "for module in preload.MODULES['qgrid']: importlib.import_module(module)\n"
        "for kind in ('methods', 'runtimes', 'measure', 'serving'):\n"
        "    package = importlib.import_module(f'qgrid.{kind}')\n"
        "    for each in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(f'qgrid.{kind}.{each.name}')\n"
        "print(qgrid.__file__)\n"
    )
    shown = tmp_path_factory.mktemp("shown")
    own = interpreters.variables(recipe.environment, shown, recipe.kind)
    command = [str(build.interpreter), "-c", code]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(shown / "qgrid" / "__init__.py")


def test_the_identity_of_a_package_is_its_locked_version() -> None:
    kind = device.describe().kind
    for name in recipes.names():
        locked = environment.locked_versions(name, kind)
        assert set(recipes.recipe(name, kind).told) <= locked.keys()
