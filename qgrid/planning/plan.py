"""Cells from choices: widths, legality, identities, baselines, order. Pure apart from `Facts`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qgrid import codec, registry
from qgrid.lora import adapters
from qgrid.planning import baseline, estimate, idle, legality
from qgrid.planning import facts as lookups
from qgrid.types import Cell, Choice, Dtype, Method, MethodSupport, PlannedCell
from qgrid.weights import widths

if TYPE_CHECKING:
    from qgrid.planning.facts import Facts

_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class EmptyGrid(ValueError):
    """Nothing is left to run; the message names the rules that refused every cell."""


class WidthConflict(ValueError):
    """`bits` and an option of the method name different widths."""


def build(choices: Iterable[Choice], facts: Facts, may_be_empty: bool = False) -> list[PlannedCell]:
    """The plan of a grid: resolved, without duplicates, with baselines, neighbours sharing work.

    Raises:
        EmptyGrid: every cell was refused, and that `may_be_empty` was not said.
        WidthConflict: `bits` and a method option disagree.
    """
    cells: dict[str, PlannedCell] = {}
    rules: Counter[str] = Counter()
    first: dict[str, str] = {}
    for choice in choices:
        planned, refusal = _planned(choice, facts)
        known = cells.get(planned.cell_id)
        if known is not None:
            cells[planned.cell_id] = replace(known, notes=_joined(known.notes, planned.notes))
            continue
        cells[planned.cell_id] = planned
        if refusal is not None:
            rules[refusal.rule] += 1
            first.setdefault(refusal.rule, refusal.reason)
    is_final = (p.status not in {None, "crashed"} for p in cells.values())  # a hub may answer later
    if not may_be_empty and all(is_final):
        raise EmptyGrid(_emptied(rules, first))
    for planned in [p for p in cells.values() if p.status is None]:
        needed = _baseline(planned, facts)
        cells.setdefault(needed.cell_id, needed)
    return _ordered(list(cells.values()))


def _planned(choice: Choice, facts: Facts) -> tuple[PlannedCell, legality.Refusal | None]:
    support = registry.support(choice.method)
    bits, notes = _width(choice, support)
    if not support.stores_weights:
        notes = (*notes, f"{bits} bits as stated by who serves the model; no weights are measured")
    method = facts.resolved(choice.method, bits)
    cell = Cell(
        model=adapters.settled(choice.model),
        method=method,
        bits=bits,
        runtime=idle.settled(choice.runtime, choice.kv_cache),
        gpu=facts.gpu(choice.gpu, registry.runtime(choice.runtime.name).LOADS.remote),
        kv_cache=choice.kv_cache,
        calibration=choice.calibration if _calibrates(method, support) else None,
        slices=choice.slices,
        workload=choice.workload,
        context=choice.context,
        seed=choice.seed,
    )
    notes = (*notes, *adapters.unheard(choice.model), *widths.unheard(choice.method))
    notes = (*notes, *idle.unheard(choice.runtime, choice.kv_cache))
    planned, refusal = judged(cell, facts)
    return replace(planned, notes=_joined(notes, planned.notes)), refusal


def judged(
    cell: Cell, facts: Facts, added: bool = False
) -> tuple[PlannedCell, legality.Refusal | None]:
    """A resolved cell with its identities and planned figures, and why it is refused, if it is."""
    predicted = _predicted(cell, facts)
    refusal = legality.refusal(cell, registry.support(cell.method), predicted, facts)
    planned = identified(cell, facts, added)
    planned = replace(planned, predicted=predicted, notes=adapters.notes(cell))
    if refusal is None:
        return planned, None
    return replace(planned, status=refusal.status, reason=refusal.reason), refusal


def _calibrates(method: Method, support: MethodSupport) -> bool:
    """Whether the method looks at calibration text with these options."""
    decides = getattr(registry.method(method.name), "calibrates", None)
    return support.calibrated if decides is None else bool(decides(method.options))


def _width(choice: Choice, support: MethodSupport) -> tuple[int, tuple[str, ...]]:
    """The width a method will use for what was asked."""
    option_bits = getattr(registry.method(choice.method.name), "option_bits", None)
    implied = option_bits(choice.method.options) if option_bits is not None else None
    asked = choice.bits
    if implied is not None and asked is not None and implied != asked:
        raise WidthConflict(
            f"`bits={asked}` and the options of `method={choice.method.name}` disagree: "
            f"they mean {implied} bits; drop one of the two"
        )
    only = support.default_bits
    if support.bits == (only,) and only >= baseline.UNQUANTIZED and asked not in (None, only):
        name = choice.method.name
        note = f"`{name}` has the one width {only}; `bits={asked}` gives the same cell"
        return only, (note,)
    if asked is None:
        asked = support.default_bits if implied is None else implied
    return asked, ()


def _predicted(cell: Cell, facts: Facts) -> dict[str, float]:
    """Planned memory where the model's sizes are known and this machine computes."""
    sizes = facts.architecture(cell.model)
    if sizes is None or registry.runtime(cell.runtime.name).LOADS.remote:
        return {}
    users = max((1, *cell.workload.concurrency))
    weights = _weight_bytes(cell, sizes) + _adapter_bytes(cell, facts)
    load = cell.workload
    longest = max(cell.context, load.prompt_tokens + load.output_tokens)
    return estimate.predict(weights, sizes, _kv_bits(cell), longest, users)


def _kv_bits(cell: Cell) -> float:
    """Bits of a stored key or value: as the runtime says, where it has this cache at all."""
    runtime = registry.runtime(cell.runtime.name)
    own = getattr(runtime, "kv_bits", None)
    has = cell.kv_cache.name in runtime.LOADS.kv_cache.get(cell.gpu.kind, ())
    return float(own(cell)) if own is not None and has else cell.kv_cache.bits


def _weight_bytes(cell: Cell, sizes: estimate.Architecture) -> float:
    """Planned bytes of all weights, by what the method says of its whole file or its linears."""
    method, options = registry.method(cell.method.name), cell.method.options
    whole = getattr(method, "bits_per_weight", None)
    if whole is not None:
        return sizes.total_weights * float(whole(cell.bits, options)) / 8
    exact = getattr(method, "stored_bits", None)

    def stored(bits: int) -> float:
        if exact is None or bits >= baseline.UNQUANTIZED:
            return float(bits)
        found = exact(bits, options, *estimate.LARGE)
        return float(max(found) if isinstance(found, tuple) else found)

    return sizes.weight_bytes(widths.mean(cell, stored))


def _adapter_bytes(cell: Cell, facts: Facts) -> int:
    """Planned bytes of an adapter beside the weights, in the wider of the dtypes that compute."""
    widest = max(_BYTES[dtype] for dtype in (cell.runtime.dtype, cell.runtime.speed_dtype))
    return facts.adapter_parameters(cell.model) * widest


def identified(cell: Cell, facts: Facts, added: bool) -> PlannedCell:
    """A cell with the identities that its configuration and contents give it."""
    artifact_id = _artifact_id(cell, facts)
    base = baseline.of(cell)
    base_artifact = artifact_id if base == cell else _artifact_id(base, facts)
    quality_id = _quality_id(cell, artifact_id, base_artifact, facts)
    cell_id = _cell_id(cell, quality_id, facts)
    baseline_id = None
    if base != cell:
        base_quality = _quality_id(base, base_artifact, base_artifact, facts)
        baseline_id = _cell_id(base, base_quality, facts)
    return PlannedCell(cell_id, artifact_id, quality_id, baseline_id, cell, added)


def _artifact_id(cell: Cell, facts: Facts) -> str:
    support = registry.support(cell.method)
    calibrated = cell.calibration is not None
    packages = (*support.packages, *adapters.packages(cell.model))
    return codec.digest(
        [
            facts.model(cell.model),
            facts.method(cell.method),
            cell.bits,
            facts.calibration(cell.calibration) if cell.calibration is not None else None,
            cell.seed if calibrated else None,
            lookups.locked(packages, support.environment, cell.gpu.kind),
        ]
    )


def _quality_id(cell: Cell, artifact_id: str, base_artifact_id: str, facts: Facts) -> str:
    module = registry.runtime(cell.runtime.name)
    runtime, more = module.LOADS, getattr(module, "more_packages", None)
    packages = (*runtime.packages, *(() if more is None else more(cell)))
    return codec.digest(
        [
            artifact_id,
            base_artifact_id,
            cell.runtime.name,
            cell.runtime.dtype,
            facts.digest(_quality_options(cell)),
            lookups.locked(packages, runtime.environment, cell.gpu.kind),
            cell.kv_cache.name,
            cell.gpu.kind if cell.gpu.capability is None else cell.gpu.capability,
            cell.context,
            facts.slices(cell.slices),
            cell.seed,
        ]
    )


def _quality_options(cell: Cell) -> Mapping[str, Any]:
    """Options of the runtime that can change a number of quality: all, unless its hook says."""
    own = getattr(registry.runtime(cell.runtime.name), "quality_options", None)
    found: Mapping[str, Any] = cell.runtime.options if own is None else own(cell.runtime.options)
    return found


def _cell_id(cell: Cell, quality_id: str, facts: Facts) -> str:
    parts = [cell.model.name, facts.device(cell.gpu), cell.slices.name]
    if _quality_options(cell) != cell.runtime.options:
        parts.append(facts.digest(cell.runtime.options))
    timing = [cell.runtime.speed_dtype, cell.runtime.threads]
    return codec.digest([quality_id, *parts, *timing, facts.digest(cell.workload)])


def _baseline(planned: PlannedCell, facts: Facts) -> PlannedCell:
    cell = baseline.of(planned.cell)
    if cell == planned.cell:
        return planned
    return judged(cell, facts, added=True)[0]


def _ordered(cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    """Baselines of a model before what is compared with them; one artifact's cells together."""
    models: dict[str, int] = {}
    artifacts: dict[str, int] = {}
    for planned in cells:
        models.setdefault(planned.cell.model.name + planned.cell.model.id, len(models))
        artifacts.setdefault(planned.artifact_id, len(artifacts))

    def place(planned: PlannedCell) -> tuple[bool, int, bool, int]:
        model = models[planned.cell.model.name + planned.cell.model.id]
        is_candidate = planned.baseline_cell_id is not None
        return planned.status is not None, model, is_candidate, artifacts[planned.artifact_id]

    return sorted(cells, key=place)


def _emptied(rules: Counter[str], first: Mapping[str, str]) -> str:
    counted = (f"{count} by `{rule}`: {first[rule]}" for rule, count in rules.most_common())
    return f"the grid is empty: every cell was refused ({'; '.join(counted)})"


def _joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *second]))
