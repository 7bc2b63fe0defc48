"""What works on this machine: device and environments as found, methods and runtimes as tried."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Iterator, Mapping

from qgrid import commands, device, environment, phrases, registry
from qgrid.envs import builds, locks, recipes
from qgrid.planning import facts
from qgrid.types import DeviceKind, Gpu, MethodSupport, RuntimeSupport
from qgrid.verbs import trials

QUICK = "--quick"

TOLD = ("torch", "transformers", "llmcompressor", "compressed-tensors")  # of the main environment


def main(arguments: list[str]) -> int:
    """Print the report; `NAME ...` try only these, `--quick` nothing; 1 if a trial failed.

    Raises:
        commands.WrongCommand: an unknown argument.
    """
    names = [word for word in arguments if word != QUICK]
    known = {*registry.names("methods"), *registry.names("runtimes")}
    if unknown := [name for name in names if name not in known]:
        raise commands.WrongCommand(
            f"`qgrid doctor` takes `{QUICK}` and names of methods and runtimes, got "
            f"`{unknown[0]}` (has: {', '.join(sorted(known))})"
        )
    found = {} if QUICK in arguments else trials.run(device.describe().kind, names)
    print(render(found, names))  # noqa: T201
    return int(any(each.failed for each in found.values()))


def render(tried: trials.Outcomes, only: Collection[str] = ()) -> str:
    """A report of two lines an environment, and one line a method and a runtime (of `only` these).

    Of what was not tried it says only whether it is installed.
    """
    found = device.describe()
    lines = [f"device    {found.name}, {found.memory_gib:.0f} GiB", "", *_environments(found.kind)]
    methods, runtimes = _methods(found, tried, only), _runtimes(found, tried, only)
    return "\n".join([*lines, "", *methods, "", *runtimes])


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


def _shown(kind: registry.Kind, only: Collection[str]) -> list[str]:
    return sorted(name for name in registry.names(kind) if not only or name in only)


def _methods(here: Gpu, tried: trials.Outcomes, only: Collection[str]) -> Iterator[str]:
    yield f"{'method':<14}{'bits':<20}{'makes':<34}state"
    for name in _shown("methods", only):
        try:
            support = registry.method(name).SUPPORTS
        except registry.BrokenModule as error:
            yield f"{name:<14}{error}"
            continue
        outcome = tried.get(("methods", name))
        state = _state(support, here) if outcome is None else outcome.told
        bits = ",".join(str(width) for width in support.bits)
        made = ",".join(dict.fromkeys(support.produces.values()))
        yield f"{name:<14}{bits:<20}{made:<34}{state}"


def _runtimes(here: Gpu, tried: trials.Outcomes, only: Collection[str]) -> Iterator[str]:
    kind = here.kind
    yield f"{'runtime':<14}state"
    for name in _shown("runtimes", only):
        try:
            loads = registry.runtime(name).LOADS
        except registry.BrokenModule as error:
            yield f"{name:<14}{error}"
            continue
        formats = ",".join(loads.loads.get(kind, ())) or "nothing"
        outcome = tried.get(("runtimes", name))
        state = _state(loads, here) if outcome is None else outcome.told
        readable = kind in loads.loads
        yield f"{name:<14}{state if readable else f'does not run on {kind}'}; loads {formats}"


def _state(declared: MethodSupport | RuntimeSupport, here: Gpu) -> str:
    """Whether a method or runtime has what it needs here, in the environment that it names."""
    where = declared.environment
    objection = (
        facts.missing(declared.packages, where, here.kind)
        or facts.broken(declared.broken, where, here.kind)
        or device.lack(here, declared.capability, getattr(declared, "needs_gpu", False))
    )
    if objection is not None:
        return objection
    return "installed" if where == recipes.MAIN else f"installed, in the environment `{where}`"
