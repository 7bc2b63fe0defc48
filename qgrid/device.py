"""The device of this machine, without torch: `nvidia-smi` where there is one, else `/proc`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

from qgrid.types import Gpu

QUERY = ("index", "uuid", "name", "memory.total", "compute_cap", "driver_version")
NVIDIA_SMI = "nvidia-smi"
SMI_SECONDS = 20.0
MEMORY_TOLERANCE = 0.12  # data sheets say 80 where the driver says 79.6, and 24 where it says 22.5


def describe() -> Gpu:
    """The device that a cell would run on: the first visible CUDA device and its twins, or the CPU.

    Memory is in whole GiB, so that a restart of the same machine gives the same description.
    """
    cards = visible(query(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return _card(cards) if cards else _cpu()


def matches(planned: Gpu, found: Gpu) -> bool:
    """Whether a cell planned for `planned` may run on `found`; see `mismatch`."""
    return mismatch(planned, found) is None


def mismatch(planned: Gpu, found: Gpu) -> str | None:
    """In what `found` is not the device that was planned, as keys of `gpu`; None: it is.

    The name must hold `planned.match` as whole words, kind and capability must be equal, the
    memory must be the planned one within 12 %, and there must be enough devices.
    """
    words = rf"(?<![a-z0-9]){re.escape(planned.match.lower())}(?![a-z0-9])"
    apart = abs(planned.memory_gib - found.memory_gib)
    rules = {
        f"`match={planned.match}` is not in `{found.name}`": planned.match != ""
        and re.search(words, found.name.lower()) is None,
        f"`kind={planned.kind}`, found {found.kind}": planned.kind != found.kind,
        f"`capability={planned.capability}`, found {found.capability}": planned.capability
        not in {None, found.capability},
        f"`memory_gib={planned.memory_gib:g}`, found {found.memory_gib:g}": apart
        > MEMORY_TOLERANCE * planned.memory_gib,
        f"`count={planned.count}`, found {found.count}": planned.count > found.count,
    }
    return ", ".join(rule for rule, is_broken in rules.items() if is_broken) or None


def lack(gpu: Gpu, least: str | None, needs_gpu: bool = False) -> str | None:
    """What a device lacks for something that is made for GPUs of the capability `least` on.

    On a CPU nothing, unless it `needs_gpu`; of a GPU whose capability is not known nothing either.
    """
    wanted = "a GPU" if least is None else f"a GPU of compute capability {_dotted(least)} or more"
    if gpu.kind == "cpu":
        return f"needs {wanted}" if needs_gpu else None
    if least is None or gpu.capability is None or _number(gpu.capability) >= _number(least):
        return None
    return f"needs {wanted}; `gpu={gpu.name}` has {_dotted(gpu.capability)}"


def _number(capability: str) -> int:
    """90 for `sm_90`, also for `sm_90a`."""
    return int(re.sub(r"\D", "", capability))


def _dotted(capability: str) -> str:
    """`9.0` for `sm_90`, as drivers and documentation write it."""
    return f"{_number(capability) // 10}.{_number(capability) % 10}"


@cache
def query() -> list[dict[str, str]]:
    """One row of `QUERY` fields for each NVIDIA card; empty where there is no working driver.

    Asked once a process: the driver takes up to a second to answer.
    """
    command = [NVIDIA_SMI, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(QUERY, row, strict=True)) for row in rows if len(row) == len(QUERY)]


def visible(cards: list[dict[str, str]], wanted: str | None) -> list[dict[str, str]]:
    """The cards that `CUDA_VISIBLE_DEVICES` lets a process see, in its order; None: all."""
    if wanted is None:
        return cards
    chosen = []
    for name in (part.strip() for part in wanted.split(",")):
        found = [
            card
            for card in cards
            if name and (card["index"] == name or card["uuid"].startswith(name))
        ]
        if not found:
            break  # CUDA, too, stops at the first name that it does not know
        chosen.append(found[0])
    return chosen


def _card(cards: list[dict[str, str]]) -> Gpu:
    first = cards[0]
    return Gpu(
        name=first["name"],
        kind="cuda",
        match=first["name"],
        capability="sm_" + first["compute_cap"].replace(".", ""),
        memory_gib=float(round(float(first["memory.total"]) / 1024)),
        bandwidth_gb_s=None,
        count=sum(card["name"] == first["name"] for card in cards),
    )


def _cpu() -> Gpu:
    name = f"{cpu_model()}, {num_cores()} cores"
    return Gpu(
        name=name,
        kind="cpu",
        match=name,
        capability=None,
        memory_gib=float(round(memory_bytes() / 2**30)),
        bandwidth_gb_s=None,
        count=1,
    )


def cpu_model() -> str:
    """The processor's name as the kernel reports it."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def cpu_fields() -> dict[str, str]:
    """The fields of the first processor in `/proc/cpuinfo`; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def num_cores() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_threads(wanted: int | None) -> int:
    """Threads to compute with on a CPU: as wanted, else the physical cores that may be used."""
    import psutil

    if wanted is not None:
        return wanted
    physical = psutil.cpu_count(logical=False)
    return max(1, min(physical, num_cores()) if physical else num_cores())


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
