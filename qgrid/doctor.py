"""What works on this machine: the device, each method and each runtime, without importing them."""

from __future__ import annotations

from collections.abc import Iterator

from qgrid import device, facts, registry


def render() -> str:
    """A report of one line a method and a runtime."""
    found = device.describe()
    lines = [f"device    {found.name}, {found.memory_gib:.0f} GiB", *_methods(found.kind), ""]
    return "\n".join([*lines, *_runtimes(found.kind)])


def _methods(kind: str) -> Iterator[str]:
    yield ""
    yield f"{'method':<14}{'bits':<12}{'makes':<34}state"
    for name in sorted(registry.names("methods")):
        try:
            support = registry.method(name).SUPPORTS
        except registry.BrokenModule as error:
            yield f"{name:<14}{error}"
            continue
        absent = facts.missing(support.packages, support.environment)
        state = "works here" if absent is None else absent
        if support.needs_gpu and kind == "cpu":
            state = "needs a GPU to quantize"
        bits = ",".join(str(width) for width in support.bits)
        made = ",".join(dict.fromkeys(support.produces.values()))
        yield f"{name:<14}{bits:<12}{made:<34}{state}"


def _runtimes(kind: str) -> Iterator[str]:
    yield f"{'runtime':<14}state"
    for name in sorted(registry.names("runtimes")):
        try:
            loads = registry.runtime(name).LOADS
        except registry.BrokenModule as error:
            yield f"{name:<14}{error}"
            continue
        readable = {k: v for k, v in loads.loads.items() if k == kind}
        absent = facts.missing(loads.packages, loads.environment)
        formats = ",".join(next(iter(readable.values()), ("nothing",)))
        state = "works here" if absent is None else absent
        yield f"{name:<14}{state if readable else f'does not run on {kind}'}; loads {formats}"
