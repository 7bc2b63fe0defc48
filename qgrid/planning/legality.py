"""Which cells can run at all: derived from what methods, runtimes and devices declare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qgrid import device, registry
from qgrid.contracts import Unreachable
from qgrid.lora import adapters
from qgrid.planning import estimate
from qgrid.planning import facts as lookups
from qgrid.types import Cell, MethodSupport, Status

if TYPE_CHECKING:
    from qgrid.planning.estimate import Architecture
    from qgrid.planning.facts import Facts


@dataclass(frozen=True)
class Refusal:
    """Why a cell will not run: the status, the rule's name and one sentence."""

    status: Status
    rule: str
    reason: str


def refusal(
    cell: Cell, support: MethodSupport, predicted: dict[str, float], facts: Facts
) -> Refusal | None:
    """The first rule that a cell breaks, from what method and runtime declare; None if legal."""
    return (
        _refused_width(cell, support)
        or _refused_packages(cell, support)
        or _refused_device(cell, support)
        or _refused_adapter(cell, support, facts)
        or _refused_model(cell, support, facts)
        or _refused_by_method(cell, facts)
        or _refused_by_runtime(cell, support)
        or _refused_by_memory(cell, predicted)
        or _refused_by_length(cell, facts.architecture(cell.model))
    )


def _refused_width(cell: Cell, support: MethodSupport) -> Refusal | None:
    if cell.bits in support.bits:
        return None
    reason = _no_such_width(cell.method.name, cell.bits, support)
    return Refusal("unsupported", "bits", reason)


def _refused_packages(cell: Cell, support: MethodSupport) -> Refusal | None:
    loads = registry.runtime(cell.runtime.name).LOADS
    for name, declared in ((cell.method.name, support), (cell.runtime.name, loads)):
        where, kind = declared.environment, cell.gpu.kind
        if absent := lookups.missing(declared.packages, where, kind):
            return Refusal("unsupported", "packages", f"`{name}` {absent}")
        if wrong := lookups.broken(declared.broken, where, kind):
            return Refusal("unsupported", "versions", f"`{name}` {wrong}")
    return None


def _refused_device(cell: Cell, support: MethodSupport) -> Refusal | None:
    """A device on which the method cannot quantize, or the runtime not compute."""
    least = registry.runtime(cell.runtime.name).LOADS.capability
    if lacks := device.lack(cell.gpu, support.capability, support.needs_gpu):
        return Refusal("unsupported", "device", f"method `{cell.method.name}` {lacks}")
    if lacks := device.lack(cell.gpu, least):
        return Refusal("unsupported", "device", f"runtime `{cell.runtime.name}` {lacks}")
    return None


def _refused_adapter(cell: Cell, support: MethodSupport, facts: Facts) -> Refusal | None:
    """Why the model's adapter cannot be applied, or not in this cell."""
    model, method = cell.model, cell.method.name
    loads = registry.runtime(cell.runtime.name).LOADS
    if reason := facts.adapter(model):
        return Refusal("unsupported", "adapter", reason)
    attached = adapters.is_attached(model)
    where = loads.environment if attached else support.environment
    if absent := lookups.missing(adapters.packages(model), where, cell.gpu.kind):
        return Refusal("unsupported", "packages", f"`model.adapter` {absent}")
    if attached and support.produces[cell.bits] not in loads.adapters:
        return Refusal("unsupported", "adapter", _no_adapter_beside(cell, support))
    if model.adapter is not None and not (
        support.stores_weights and (support.from_base or attached)
    ):
        reason = (
            f"method `{method}` takes weights that somebody else made, into which `model.adapter` "
            "cannot be merged any more; leave `model.adapter` out"
        )
        return Refusal("unsupported", "adapter", reason)
    return None


def _no_adapter_beside(cell: Cell, support: MethodSupport) -> str:
    """That the runtime keeps no adapter beside what the method stores, and two ways out."""
    made, where = support.produces[cell.bits], f"runtime `{cell.runtime.name}`"
    able = registry.runtime(cell.runtime.name).LOADS.adapters
    others = [
        name
        for name, runtime in registry.working("runtimes").items()
        if made in runtime.LOADS.adapters
    ]
    beside = f"beside `{made}` (beside: {_list(able)})" if able else "beside any weights"
    way = f"`runtime={others[0]}`" if others else f"a method that stores one of {_list(able)}"
    way = way if others or able else "another runtime"
    return (
        f"{where} keeps no adapter {beside}; use `model.adapter_mode=merged`, or {way} for "
        "`model.adapter_mode=attached`"
    )


def _refused_model(cell: Cell, support: MethodSupport, facts: Facts) -> Refusal | None:
    """A base that is quantized itself: the 16-bit baseline would be none."""
    reason = facts.quantized(cell.model) if support.stores_weights else None
    return None if reason is None else Refusal("unsupported", "model", reason)


def _refused_by_method(cell: Cell, facts: Facts) -> Refusal | None:
    """What the method itself says about this model, such as a group size that does not divide."""
    try:
        reason = facts.objection("refusal", cell)
    except Unreachable as error:
        return Refusal("crashed", "method", str(error))
    if reason:
        return Refusal("unsupported", "method", reason)
    if reason := facts.objection("mismatch", cell):
        return Refusal("invalid", "method", reason)
    return None


def _refused_by_runtime(cell: Cell, support: MethodSupport) -> Refusal | None:
    loads = registry.runtime(cell.runtime.name).LOADS
    where = f"runtime `{cell.runtime.name}` on {cell.gpu.kind}"
    made, readable = support.produces[cell.bits], loads.loads.get(cell.gpu.kind, ())
    if made not in readable:
        advice = _other_runtime(made, cell) or "another method or runtime"
        reason = f"{where} does not load `{made}` (loads: {_list(readable)}); use {advice}"
        return Refusal("unsupported", "format", reason)
    intents = loads.kv_cache.get(cell.gpu.kind, ())
    if cell.kv_cache.name not in intents:
        reason = f"{where} has no `kv_cache={cell.kv_cache.name}` (has: {_list(intents)})"
        return Refusal("unsupported", "kv_cache", reason)
    return _refused_options(cell)


def _other_runtime(format_: str, cell: Cell) -> str:
    """A runtime that loads the format, or the method that writes what the asked one loads."""
    own = registry.runtime(cell.runtime.name).LOADS.baseline
    ways = [f"`method={own}`"] if own != cell.method.name else []
    for name, runtime in registry.working("runtimes").items():
        if format_ in runtime.LOADS.loads.get(cell.gpu.kind, ()):
            ways.append(f"`runtime={name}`")
    return " or ".join(ways)


def _refused_options(cell: Cell) -> Refusal | None:
    """Compute dtypes that the runtime does not have, and options that cannot go together."""
    runtime = registry.runtime(cell.runtime.name)
    for key in ("dtype", "speed_dtype"):
        asked = getattr(cell.runtime, key)
        if asked not in runtime.LOADS.dtypes:
            has = _list(runtime.LOADS.dtypes)
            reason = f"runtime `{cell.runtime.name}` has no `runtime.{key}={asked}` (has: {has})"
            return Refusal("unsupported", "dtype", reason)
    own = getattr(runtime, "refusal", None)
    objection = None if own is None else own(cell)
    return None if objection is None else Refusal("unsupported", "runtime", objection)


def _refused_by_memory(cell: Cell, predicted: dict[str, float]) -> Refusal | None:
    need = predicted.get("total_bytes", 0) / estimate.GIB
    room = cell.gpu.memory_gib * cell.gpu.count
    if need <= room:
        return None
    reason = f"weights and KV cache take {need:.2f} GiB; {cell.gpu.name} has {room:.2f} GiB"
    return Refusal("does_not_fit", "memory", reason)


def _refused_by_length(cell: Cell, sizes: Architecture | None) -> Refusal | None:
    if sizes is None or sizes.positions is None:
        return None
    load = cell.workload
    for key, length in (
        ("context", cell.context),
        (
            "workload.prompt_tokens + workload.output_tokens",
            load.prompt_tokens + load.output_tokens,
        ),
    ):
        if length > sizes.positions:
            reason = (
                f"`{key}` is {length}; model `{cell.model.name}` takes {sizes.positions} tokens"
            )
            return Refusal("unsupported", "length", reason)
    return None


def _no_such_width(method: str, bits: int, support: MethodSupport) -> str:
    others = [
        name
        for name, other in registry.working("methods").items()
        if name != method and bits in other.SUPPORTS.bits and other.SUPPORTS.stores_weights
    ]
    advice = f"; use `method={others[0]}`" if others else ""
    if len(others) > 1:
        advice = f"; methods with {bits} bits: {', '.join(others)}"
    has = _list(support.bits)
    if bits in registry.method(method).SUPPORTS.bits:  # the options ask for something narrower
        every = _list(registry.method(method).SUPPORTS.bits)
        return (
            f"method `{method}` with these options has no `bits={bits}` (has: {has}); its defaults "
            f"have {every}{advice}"
        )
    return f"method `{method}` has no `bits={bits}` (has: {has}){advice}"


def _list(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names) or "nothing"
