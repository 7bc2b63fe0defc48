"""One build of an environment: in place, under a lock, its marker last; half a build is removed."""

from __future__ import annotations

import contextlib
import fcntl
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qgrid import environment, redact
from qgrid.envs import builds, locks
from qgrid.envs.builds import Build
from qgrid.envs.recipes import Recipe
from qgrid.envs.screen import Screen

POLL_SECONDS = 0.5
OFFLINE = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|name resolution|unreachable"
)
FULL = re.compile(r"No space left on device|Disk quota exceeded")
FULL_BYTES = 2**20
COLLECTED = re.compile(r"^(?:Collecting|Processing|Requirement) ", flags=re.MULTILINE)


class NotBuilt(RuntimeError):
    """The environment could not be built; one sentence says why and what to do."""


def build(recipe: Recipe, first_args: Sequence[str], screen: Screen) -> tuple[Build, bool]:
    """The whole environment of a recipe, and whether it was built now.

    `first_args` are arguments of pip for the packages that go first, such as an index of builds for
    this kind of device. A second process waits for the first and finds what it built.

    Raises:
        NotBuilt: nothing of it is left then, but the log.
    """
    folder = builds.folder_of(recipe)
    with _alone(folder, screen) as lock:
        found = builds.find(recipe)
        if found is not None:
            return found, False
        _refuse(recipe)
        if folder.exists():
            screen.say("removing what an interrupted build has left ...")
            builds.remove(folder)
        build = Build(folder, platform.python_version(), 0, 0.0)
        site = _Site(recipe, build, screen, folder.with_name(f"{folder.name}.log"), lock)
        try:
            return _built(site, first_args), True
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise NotBuilt(f"files cannot be written in {builds.home()}: {error}") from None
            raise


@contextlib.contextmanager
def _alone(folder: Path, screen: Screen) -> Iterator[int]:
    """Hold the lock of a build; say so before waiting for another process that has it.

    The lock's descriptor is for the programs that the build starts: if this process is killed, a
    pip that goes on writing keeps the next build waiting.
    """
    path = folder.with_name(f"{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise NotBuilt(
            f"environments cannot be kept in {path.parent} ({error.strerror}); set QGRID_ENVS to a "
            "folder that you may write"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            screen.say("another process is building it; waiting ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _refuse(recipe: Recipe) -> None:
    """Say before any work why it cannot succeed here."""
    mine = ".".join(platform.python_version_tuple()[:2])
    if mine not in recipe.python:
        raise NotBuilt(
            f"the lock `{recipe.lock}` is for Python {', '.join(recipe.python)}, and this is "
            f"{mine}; install qgrid in one of these and run the command with it"
        )
    free = shutil.disk_usage(builds.home()).free / 2**30
    if free < recipe.gib:
        raise NotBuilt(
            f"environment `{recipe.environment}` needs about {recipe.gib:g} GiB, and "
            f"{builds.home()} has {free:.1f} free; make room or set QGRID_ENVS to another place"
        )


@dataclass(frozen=True)
class _Site:
    """One build under way."""

    recipe: Recipe
    build: Build
    screen: Screen
    log: Path
    lock: int  # its descriptor


def _built(site: _Site, first_args: Sequence[str]) -> Build:
    begin = time.monotonic()
    recipe, folder = site.recipe, site.build.folder
    site.screen.say(f"in {folder}")
    site.log.write_text("", encoding="utf-8")
    site.screen.step("making a virtual environment")
    _run(site, [sys.executable, "-m", "venv", str(folder)], _no_venv)
    first = {name: recipe.pins[name] for name in recipe.first}
    if first:
        _install(site, first, first_args)
        _check_torch(site)
    _install(site, {name: pin for name, pin in recipe.pins.items() if name not in first}, ())
    for name, version in recipe.stubs.items():
        _write_stub(site.build.site, name, version)
    site.screen.step("importing it for the first time")
    _prove(site)
    build = replace(site.build, bytes=_size(folder), seconds=time.monotonic() - begin)
    builds.mark(build, recipe)
    site.log.unlink()
    return build


def _install(site: _Site, pins: Mapping[str, str], args: Sequence[str]) -> None:
    """Install exactly these, counting them on the screen."""
    wanted = site.build.folder / "requirements.txt"
    wanted.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    pip = [str(site.build.interpreter), "-m", "pip", "install", "--no-deps", "--no-input"]
    what = ", ".join(pins) if len(pins) < 3 else f"{len(pins)} packages"
    ahead = _num_installed(site.build)
    start = site.log.stat().st_size

    def tell() -> None:
        told = site.log.read_bytes()[start:].decode(errors="replace")
        if "\nInstalling collected packages" in told:
            act, done = "installing", max(0, _num_installed(site.build) - ahead)
        else:
            act, done = "downloading", len(COLLECTED.findall(told))
        site.screen.step(f"{act} {what}", f"{min(done, len(pins))}/{len(pins)}")

    _run(site, [*pip, "-r", str(wanted), *args], _no_package, tell)


def _num_installed(build: Build) -> int:
    return sum(1 for _ in build.site.glob("*.dist-info"))


def _run(
    site: _Site,
    command: Sequence[str],
    explain: Callable[[Recipe, str], str],
    tell: Callable[[], None] | None = None,
) -> None:
    """Run a step with its output in the log.

    Raises:
        NotBuilt: it failed; `explain` turns its output into a sentence.
    """
    log, recipe = site.log, site.recipe
    start = log.stat().st_size
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(site.lock,),
            env=builds.variables(recipe) | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        try:
            while process.poll() is None:
                if tell is not None:
                    tell()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        told = log.read_bytes()[start:].decode(errors="replace")
        # On a full disk the log cannot be written either, and pip unpacks in a second place.
        places = [str(builds.home()), tempfile.gettempdir()]
        if FULL.search(told) or any(shutil.disk_usage(each).free < FULL_BYTES for each in places):
            raise NotBuilt(
                f"there is no space left in {' or '.join(places)}; make room, or set QGRID_ENVS or "
                f"TMPDIR to another place (log: {log})"
            )
        raise NotBuilt(f"{redact.text(explain(recipe, told))} (log: {log})")


def _no_venv(_: Recipe, told: str) -> str:
    if "ensurepip" in told:
        return (
            f"{sys.executable} cannot make a virtual environment; on Debian: apt-get install "
            "python3-venv"
        )
    return f"{sys.executable} cannot make a virtual environment: {_last(told)}"


def _no_package(recipe: Recipe, told: str) -> str:
    found = re.search(r"^ERROR: No matching distribution found for (\S+)", told, re.MULTILINE)
    what = found[1] if found else f"the packages of `{recipe.lock}`"
    if OFFLINE.search(told):
        return f"pip cannot reach its package index, so {what} cannot be installed"
    if found:
        return f"pip finds no {what} for this Python and machine in its package index"
    return f"pip could not install {what}: {_last(told)}"


def _unproven(recipe: Recipe, told: str) -> str:
    return f"environment `{recipe.environment}` was installed and does not work: {_last(told)}"


def _last(told: str) -> str:
    """The last error of an output, else its last line."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it says nothing"])[-1]


def _check_torch(site: _Site) -> None:
    """The build of torch that the index gave is for this kind of device."""
    recipe, torch = site.recipe, site.build.site / "torch"
    if not torch.is_dir():
        return
    cuda = environment.cuda_of(torch)
    if (cuda is None) == (recipe.kind == "cpu"):
        return
    given = "a CPU" if cuda is None else f"CUDA {cuda}"
    raise NotBuilt(
        f"the torch of your package index is a build for {given}, and `{recipe.lock}` needs one "
        f"for {recipe.kind}; name an index that has it: "
        f"`{builds.command(recipe)} -- --index-url URL`"
    )


def _write_stub(site: Path, name: str, version: str) -> None:
    """A distribution that has nothing but a name and a version."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("qgrid\n")
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD"))
    )


def _prove(site: _Site) -> None:
    """Import what the environment is for, away from any other package; compare with the lock."""
    recipe = site.recipe
    pins, found = recipe.contents(), site.build.versions()
    versions = {name: found.get(locks.normalized(name), "absent") for name in pins}
    wrong = locks.deviations(pins, versions)
    if wrong:
        raise NotBuilt(f"environment `{recipe.environment}` is not as locked: {', '.join(wrong)}")
    code = "".join(f"import {module}\n" for module in recipe.modules) + recipe.check
    _run(site, [str(site.build.interpreter), "-I", "-c", code], _unproven)


def _size(folder: Path) -> int:
    """Bytes that a folder takes on disk."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sum(stat.st_blocks * 512 for stat in found)
