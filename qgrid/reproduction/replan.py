"""The cells of a lock planned again, with identities from what is here now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qgrid import codec, registry
from qgrid.files import HashCache
from qgrid.planning import plan
from qgrid.planning.facts import AUTO, Facts
from qgrid.reproduction import parts
from qgrid.reproduction.lock import Lock, Parts, is_described
from qgrid.types import Method, PlannedCell, Runtime


def changed(planned: Sequence[PlannedCell], cache: HashCache) -> tuple[str, ...]:
    """Cells whose identities are no longer those of the plan, for an input was altered since.

    Also cells whose files cannot be read any more.
    """
    facts = Facts(cache)
    whole, compositions = parts.taken_apart(planned)
    found = []
    for each in planned:
        cell = parts.put_together(whole, compositions[each.cell_id])
        try:
            same = plan.identified(cell, facts, each.added).cell_id == each.cell_id
        except (OSError, ValueError):
            same = False
        if not same:
            found.append(each.cell_id)
    return tuple(found)


def for_here(whole: Parts, facts: Facts) -> Parts:
    """The parts as this qgrid knows them: options checked, a described device this machine.

    Raises:
        registry.UnknownName: a method or a runtime that it lacks.
        codec.InvalidValue: an option that it does not have, or that is missing.
    """
    return replace(
        whole,
        methods={name: _method(each) for name, each in whole.methods.items()},
        runtimes={name: _runtime(each) for name, each in whole.runtimes.items()},
        gpus={
            name: facts.gpu(AUTO) if is_described(each) else each
            for name, each in whole.gpus.items()
        },
    )


def _method(method: Method) -> Method:
    kind: type[Any] = registry.method(method.name).Options
    checked = codec.convert(kind, method.options, f"method={method.name}")
    return replace(method, options=codec.plain(checked))


def _runtime(runtime: Runtime) -> Runtime:
    kind: type[Any] = registry.runtime(runtime.name).Options
    checked = codec.convert(kind, runtime.options, f"runtime={runtime.name}")
    return replace(runtime, options=codec.plain(checked))


def replanned(lock: Lock, whole: Parts, facts: Facts) -> dict[str, PlannedCell]:
    """By the id of each locked cell: the cell of these parts as it would be planned now.

    Raises:
        OSError: a file that the cell needs is not here.
    """
    return {
        cell_id: plan.judged(parts.put_together(whole, each.cell), facts, each.added)[0]
        for cell_id, each in lock.cells.items()
    }
