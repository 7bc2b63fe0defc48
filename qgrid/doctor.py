"""What works on this machine: device, environments, methods, runtimes; nothing is imported."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping

from qgrid import device, environment, facts, phrases, registry
from qgrid.envs import builds, locks, recipes
from qgrid.types import DeviceKind

TOLD = ("torch", "transformers", "llmcompressor", "compressed-tensors")  # of the main environment


def render() -> str:
    """A report of two lines an environment, and one line a method and a runtime."""
    found = device.describe()
    lines = [f"device    {found.name}, {found.memory_gib:.0f} GiB", "", *_environments(found.kind)]
    return "\n".join([*lines, "", *_methods(found.kind), "", *_runtimes(found.kind)])


def _environments(kind: DeviceKind) -> Iterator[str]:
    """Each environment with its lock and python; below, its main packages and what deviates."""
    yield f"{'environment':<14}{'lock':<14}state"
    main = locks.pins(recipes.MAIN, kind)
    python = f"{sys.executable} ({platform.python_version()})"
    yield f"{recipes.MAIN:<14}{recipes.MAIN:<14}{python}"
    yield _packages(environment.installed(main, recipes.MAIN, kind), main, TOLD)
    for name in recipes.names():
        recipe = recipes.recipe(name, kind)
        build = builds.find(recipe)
        if build is None:
            yield f"{name:<14}{recipe.lock:<14}not built; run `{builds.command(recipe)}`"
            continue
        pins = recipe.contents()
        yield f"{name:<14}{recipe.lock:<14}{build.interpreter} ({build.python})"
        yield _packages(environment.installed(pins, name, kind), pins, recipe.told)


def _packages(versions: Mapping[str, str], pins: Mapping[str, str], told: tuple[str, ...]) -> str:
    main = ", ".join(f"{package} {versions[package]}" for package in told if package in versions)
    wrong = locks.deviations(pins, versions)
    state = f"not as locked: {phrases.first(wrong)}" if wrong else "all packages as locked"
    return f"{'':<28}{main}; {state}"


def _methods(kind: DeviceKind) -> Iterator[str]:
    yield f"{'method':<14}{'bits':<20}{'makes':<34}state"
    for name in sorted(registry.names("methods")):
        try:
            support = registry.method(name).SUPPORTS
        except registry.BrokenModule as error:
            yield f"{name:<14}{error}"
            continue
        state = _state(support.packages, support.environment, kind)
        if support.needs_gpu and kind == "cpu":
            state = "needs a GPU to quantize"
        bits = ",".join(str(width) for width in support.bits)
        made = ",".join(dict.fromkeys(support.produces.values()))
        yield f"{name:<14}{bits:<20}{made:<34}{state}"


def _runtimes(kind: DeviceKind) -> Iterator[str]:
    yield f"{'runtime':<14}state"
    for name in sorted(registry.names("runtimes")):
        try:
            loads = registry.runtime(name).LOADS
        except registry.BrokenModule as error:
            yield f"{name:<14}{error}"
            continue
        readable = {k: v for k, v in loads.loads.items() if k == kind}
        formats = ",".join(next(iter(readable.values()), ("nothing",)))
        state = _state(loads.packages, loads.environment, kind)
        yield f"{name:<14}{state if readable else f'does not run on {kind}'}; loads {formats}"


def _state(packages: tuple[str, ...], where: str, kind: DeviceKind) -> str:
    """Whether a method or runtime has what it needs here, in the environment that it names."""
    absent = facts.missing(packages, where, kind)
    if absent is not None:
        return absent
    return "works here" if where == recipes.MAIN else f"works here, in the environment `{where}`"
