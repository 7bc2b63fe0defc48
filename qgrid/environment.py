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
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import qgrid
from qgrid import codec, device
from qgrid.types import DeviceKind

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
    "gptqmodel",
    "auto-round",
    "torchao",
    "llama-cpp-python",
    "vllm",
    "hydra-core",
    "omegaconf",
)
CPU_FLAGS = re.compile(r"avx|amx|fma|f16c|neon|asimd|sve|bf16")
LOCK_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;#]+)")


class UnknownEnvironment(ValueError):
    """An environment that has no lock file in `qgrid/envs/`."""


def lock_name(environment: str, kind: DeviceKind) -> str:
    """The lock of an environment: its own, or the one for a kind of device (`vllm-cpu`)."""
    return (
        environment
        if (files("qgrid.envs") / f"{environment}.txt").is_file()
        else f"{environment}-{kind}"
    )


@cache
def locked_versions(environment: str, kind: DeviceKind = "cpu") -> Mapping[str, str]:
    """Distribution -> version that the committed lock of an environment pins.

    A distribution is found by the name in the lock and by its normalized name.

    Raises:
        UnknownEnvironment: no such lock; the message lists the known ones.
    """
    folder = files("qgrid.envs")
    lock = folder / f"{lock_name(environment, kind)}.txt"
    if not lock.is_file():
        known = sorted(
            f.name.removesuffix(".txt") for f in folder.iterdir() if f.name[-4:] == ".txt"
        )
        raise UnknownEnvironment(
            f"environment `{environment}` has no lock in qgrid/envs (has: {', '.join(known)})"
        )
    lines = map(LOCK_LINE.match, lock.read_text(encoding="utf-8").splitlines())
    pins = {line["name"]: line["version"] for line in lines if line}
    return pins | {normalized(name): pinned for name, pinned in pins.items()}


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it: `Foo_Bar` is `foo-bar`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def deviations(environment: str = "main") -> dict[str, str]:
    """Packages whose installed version is not the locked one: name -> "installed (locked ...)".

    A local build tag (`2.13.0+cpu`) is not a deviation.
    """
    locked = locked_versions(environment)
    return {
        name: f"{version} (locked {locked[normalized(name)]})"
        for name, version in versions().items()
        if normalized(name) in locked and version.split("+")[0] != locked[normalized(name)]
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
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, flags=re.MULTILINE)
    return found[1] if found else None


def git_commit() -> str | None:
    """Commit of the checkout that qgrid runs from ("-dirty": with changes); None: no checkout."""
    root = Path(qgrid.__file__).parents[1]
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
