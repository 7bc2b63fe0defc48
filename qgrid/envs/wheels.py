"""Wheels of pinned packages that come as sources: built once for a machine, kept outside it all.

`python -m qgrid.envs.wheels` builds what is missing and prints the folders that pip must look in;
`--rest` prints the lock without these packages, which pip installs as usual. All of it runs before
anything is installed: the standard library is all it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from qgrid.files import built_aside, locked, user_cache

# Distribution -> settings of its build, before those of the user's CMAKE_ARGS.
SOURCES = {
    "llama-cpp-python": "-DLLAVA_BUILD=OFF",  # images are not text
    "PyPcre": "",
    "Defuser": "",  # it and the next need PyPcre, which pip would build again
    "GPTQModel": "",
    "hqq": "",
}
LOCK = Path(__file__).with_name("main.txt")


def main() -> int:
    """Print the folder of every wheel; a build that fails is told and left out."""
    if "--rest" in sys.argv[1:]:
        print("\n".join(rest()))  # noqa: T201
        return 0
    for name, settings in SOURCES.items():
        try:
            print(folder(f"{name}=={_pinned(name)}", settings))  # noqa: T201
        except (OSError, subprocess.CalledProcessError) as error:
            print(_failed(name, error), file=sys.stderr)  # noqa: T201
    return 0


def rest() -> list[str]:
    """The lines of the lock that pin what does not come as sources."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] not in SOURCES]


def folder(requirement: str, settings: str) -> Path:
    """Where the wheel of `requirement` lies; it is built if this machine has not built it yet.

    Raises:
        subprocess.CalledProcessError: pip could not build it.
    """
    arguments = f"{settings} {os.environ.get('CMAKE_ARGS', '')}".strip()
    target = cache() / key({"requirement": requirement, "cmake": arguments, **machine()})
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.is_dir():
            _build(requirement, arguments, target)
    return target


def cache() -> Path:
    """The folder of all wheels: `QGRID_WHEELS`, else a place of the user's own."""
    return user_cache("QGRID_WHEELS", "wheels")


def key(parts: Mapping[str, str]) -> str:
    """A wheel's folder: its package, and a hash of all that decides its machine code."""
    name = re.sub(r"[^\w.]+", "-", parts["requirement"]).strip("-")
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:16]}"


def machine() -> dict[str, str]:
    """What native code depends on: interpreter, compiler, processor and its instructions."""
    return {
        "python": f"{sys.implementation.cache_tag} {platform.system()} {platform.machine()}",
        "compiler": _compiler(),
        "cpu": _instructions(),
    }


def _compiler() -> str:
    command = os.environ.get("CXX", "c++")
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"no {command}"
    return done.stdout.partition("\n")[0]


def _instructions() -> str:
    """The flags of the first processor, which `-march=native` compiles for."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return " ".join(sorted(found[1].split())) if found else platform.processor()


def _pinned(name: str) -> str:
    found = re.search(rf"^{re.escape(name)}==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise LookupError(f"{LOCK.name} does not pin {name}")
    return found[1]


def _build(requirement: str, arguments: str, target: Path) -> None:
    _say(f"building {requirement}, once for this machine: seconds to some minutes ...")
    # pip's own cache would hand out what it built of this source with other settings.
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir"]
    with built_aside(target) as aside:
        subprocess.run(
            [*pip, requirement, "-w", aside],
            # hqq would build for CUDA, or fail where its compiler is not
            env={**os.environ, "CMAKE_ARGS": arguments, "DISABLE_CUDA": "1"},
            stdout=sys.stderr,
            check=True,
        )
    _say(f"{requirement} is kept in {target}")


def _failed(name: str, error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        why = f"{error}; set QGRID_WHEELS to a folder with room that you may write"
    elif _compiler().startswith("no "):
        why = "there is no C++ compiler; install one (on Debian: apt-get install g++)"
    else:
        why = f"pip ended with {error.returncode}"
    told = f"{name} could not be built, so what needs it will be `unsupported`: {why}"
    return f"{told}. Then run `make clean` and start again."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
