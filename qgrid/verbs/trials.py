"""One small cell of every method and every runtime, really run: `doctor` need not guess."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qgrid import codec, config, registry
from qgrid.files import HashCache
from qgrid.planning import choices, plan
from qgrid.planning.facts import Facts
from qgrid.types import FAILURES, Choice, DeviceKind, PlannedCell, Prose, Record, Slices

_PROSE = Prose("package:qgrid.demo/slices/prose.txt", 256)
_SMALL: Mapping[str, Mapping[str, Any]] = {
    "calibration": {"samples": 4, "length": 64},
    "workload": {
        "prompt_tokens": 16,
        "output_tokens": 4,
        "concurrency": [1],
        "warmup": 1,
        "repeats": 2,
    },
}
_SETTINGS: Mapping[str, Any] = {
    "name": "doctor",
    "limits": {"artifact": 600.0, "quality": 600.0, "speed": 600.0},
}


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: `works`, or why not. `failed`: it should have worked."""

    works: bool
    told: str
    failed: bool = False


Outcomes = dict[tuple[str, str], Outcome]  # kind of module and its name -> what came of it


def run(kind: DeviceKind, only: Collection[str]) -> Outcomes:
    """Try every method in the first runtime that loads what it makes, and every runtime.

    `only`: those of these names, unless it is empty. What happens is told on stderr; nothing is
    left on disk.
    """
    from qgrid import sweep
    from qgrid.running import controller
    from qgrid.running.progress import Progress

    with TemporaryDirectory(prefix="qgrid-doctor-") as place:
        store = Path(place)
        asked, found = _asked(kind, only)
        facts = Facts(HashCache(store / "hashes.json"))
        planned = plan.build(asked.values(), facts, may_be_empty=True)
        settings = choices.settings({**_configuration({}), **_SETTINGS, "out": str(store)})
        folder = sweep.write_plan(planned, settings).parent
        trial = controller.Sweep(planned, settings, folder, Progress(planned, sys.stderr))
        controller.bring(trial)
        for key, choice in asked.items():
            cell = _cell_of(choice, planned)
            found[key] = _outcome(cell, trial.records.get(cell.cell_id))
    return found


def _asked(
    kind: DeviceKind, only: Collection[str]
) -> tuple[dict[tuple[str, str], Choice], Outcomes]:
    """A choice for each module; for one that has none, why."""
    asked: dict[tuple[str, str], Choice] = {}
    found: Outcomes = {}
    for key, method, runtime in _pairs(kind):
        if only and key[1] not in only:
            continue
        if runtime is None:
            found[key] = Outcome(False, f"no runtime loads what it makes on {kind}")
            continue
        try:
            asked[key] = _choice(method, runtime)
        except FileNotFoundError:
            found[key] = Outcome(False, f"not tried: there is no `{key[0][:-1]}/{key[1]}.yaml`")
        except (codec.InvalidValue, registry.BrokenModule) as error:
            found[key] = Outcome(False, f"not tried: {error}")
    return asked, found


def _pairs(kind: DeviceKind) -> Iterator[tuple[tuple[str, str], str, str | None]]:
    """Each module with the method and the runtime that it is tried in; None: there is none."""
    preferred = config.defaults()["runtime"]
    runtimes = registry.working("runtimes")
    order = sorted(runtimes, key=lambda name: (name != preferred, name))
    for name, method in registry.working("methods").items():
        made = method.SUPPORTS.produces[method.SUPPORTS.default_bits]
        loads = (each for each in order if made in runtimes[each].LOADS.loads.get(kind, ()))
        yield ("methods", name), name, next(loads, None)
    for name, runtime in runtimes.items():
        yield ("runtimes", name), runtime.LOADS.baseline, name


def _choice(method: str, runtime: str) -> Choice:
    """A small cell of both.

    Raises:
        FileNotFoundError: one of them has no YAML.
        codec.InvalidValue: it needs a value that only a user can give.
    """
    configuration = _configuration({"method": method, "runtime": runtime})
    configuration |= {"context": 64}
    for group, changes in _SMALL.items():
        configuration[group] = {**configuration[group], **changes}
    choice = choices.Reader().choice(configuration)
    some = dict(list(choice.slices.items.items())[:1])
    items = {name: replace(each, limit=2) for name, each in some.items()}
    return replace(choice, slices=Slices("doctor", _PROSE, items))


def _configuration(chosen: Mapping[str, str]) -> dict[str, Any]:
    groups = {**config.defaults(), "tracking": "none", **chosen}
    nodes = {group: config.choice(group, name) for group, name in groups.items()}
    return {**config.scalars(), **nodes}


def _cell_of(choice: Choice, planned: list[PlannedCell]) -> PlannedCell:
    implied = getattr(registry.method(choice.method.name), "option_bits", lambda _: None)
    bits = implied(choice.method.options) or registry.support(choice.method).default_bits
    return next(
        each
        for each in planned
        if each.cell.method.name == choice.method.name
        and each.cell.runtime == choice.runtime
        and each.cell.bits == bits
    )


def _outcome(planned: PlannedCell, record: Record | None) -> Outcome:
    if record is None:
        return Outcome(False, "not tried: the trial was interrupted")
    where = f"{planned.cell.bits} bits in `{planned.cell.runtime.name}`"
    if record.status == "ok":
        return Outcome(True, f"works here ({where})")
    message = record.status if record.error is None else record.error.message
    if record.status in FAILURES or record.status == "oom":
        return Outcome(False, f"fails here ({where}): {record.status}: {message}", failed=True)
    return Outcome(False, message.removeprefix(f"`{planned.cell.method.name}` "))
