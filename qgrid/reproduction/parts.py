"""Cells taken apart: each model, method, device and so on once, under a short name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import codec, models
from qgrid.lora import adapters
from qgrid.reproduction.lock import Composition, Parts
from qgrid.types import Calibration, Cell, Model, PlannedCell, Slices

_GROUPS = {
    "model": "models",
    "method": "methods",
    "runtime": "runtimes",
    "gpu": "gpus",
    "kv_cache": "kv_caches",
    "calibration": "calibrations",
    "slices": "slices",
    "workload": "workloads",
}


def taken_apart(planned: Iterable[PlannedCell]) -> tuple[Parts, dict[str, Composition]]:
    """The parts of all cells, and each cell by its id as names of parts.

    A part is called as its `name` says; another one of the same name gets a number behind it.
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS.values()}
    names: dict[tuple[str, str], str] = {}

    def name_of(kind: str, part: Any) -> str:
        key = (kind, codec.dumps(part))
        if key not in names:
            group = groups[_GROUPS[kind]]
            names[key] = _free(_called(part), group)
            group[names[key]] = part
        return names[key]

    cells = {each.cell_id: _composition(each.cell, name_of) for each in planned}
    return Parts(**groups), cells


def _composition(cell: Cell, name_of: Callable[[str, Any], str]) -> Composition:
    drawn = cell.calibration
    return Composition(
        model=name_of("model", cell.model),
        method=name_of("method", cell.method),
        bits=cell.bits,
        runtime=name_of("runtime", cell.runtime),
        gpu=name_of("gpu", cell.gpu),
        kv_cache=name_of("kv_cache", cell.kv_cache),
        calibration=None if drawn is None else name_of("calibration", drawn),
        slices=name_of("slices", cell.slices),
        workload=name_of("workload", cell.workload),
        context=cell.context,
        seed=cell.seed,
    )


def _called(part: Any) -> str:
    """The part's name; a model's with that of its adapter."""
    adapter = part.adapter if isinstance(part, Model) else None
    return str(part.name) if adapter is None else f"{part.name}+{adapters.short(adapter)}"


def _free(name: str, taken: dict[str, Any]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} {number}"
    return found


def put_together(parts: Parts, composition: Composition) -> Cell:
    """A cell from its parts.

    Raises:
        KeyError: a name that no part has.
    """
    drawn = composition.calibration
    return Cell(
        model=parts.models[composition.model],
        method=parts.methods[composition.method],
        bits=composition.bits,
        runtime=parts.runtimes[composition.runtime],
        gpu=parts.gpus[composition.gpu],
        kv_cache=parts.kv_caches[composition.kv_cache],
        calibration=None if drawn is None else parts.calibrations[drawn],
        slices=parts.slices[composition.slices],
        workload=parts.workloads[composition.workload],
        context=composition.context,
        seed=composition.seed,
    )


def portable(parts: Parts, root: Path) -> Parts:
    """The parts with paths below `root` written relative to it; other paths as they are."""

    def file(path: str) -> str:
        try:
            place = models.resource(path)
        except FileNotFoundError:
            place = Path(path)
        return path if path.startswith("package:") else _relative(path, place, root)

    def folder(path: str) -> str:
        place = Path(path).expanduser()
        is_here = path != models.EMBEDDED and place.is_dir()
        return _relative(path, place, root) if is_here else path

    return _relocated(parts, folder, file)


def placed(parts: Parts, folders: Sequence[Path]) -> Parts:
    """The parts with relative paths as they are found in the first of `folders` that has them."""

    def file(path: str) -> str:
        own = path.startswith("package:") or Path(path).expanduser().is_absolute()
        return path if own else _found(path, folders)

    return _relocated(parts, lambda path: _found(path, folders) if path[:1] == "." else path, file)


def _relocated(parts: Parts, folder: Callable[[str], str], file: Callable[[str], str]) -> Parts:
    """The parts with the paths of checkpoints, adapters and files changed."""

    def model(each: Model) -> Model:
        adapter = None if each.adapter is None else folder(each.adapter)
        return replace(each, id=folder(each.id), adapter=adapter)

    def calibration(each: Calibration) -> Calibration:
        return each if each.path is None else replace(each, path=file(each.path))

    def slices(each: Slices) -> Slices:
        prose = None if each.prose is None else replace(each.prose, path=file(each.prose.path))
        items = {name: replace(one, path=file(one.path)) for name, one in each.items.items()}
        return replace(each, prose=prose, items=items)

    return replace(
        parts,
        models={name: model(each) for name, each in parts.models.items()},
        calibrations={name: calibration(each) for name, each in parts.calibrations.items()},
        slices={name: slices(each) for name, each in parts.slices.items()},
    )


def _found(path: str, folders: Sequence[Path]) -> str:
    places = [folder / path for folder in folders if (folder / path).exists()]
    return str(places[0].absolute()) if places else path


def _relative(path: str, place: Path, root: Path) -> str:
    """`./PATH` of what lies below `root`; the dot says that it is a path and no hub id."""
    real = place.absolute()
    return f"./{real.relative_to(root)}" if real.is_relative_to(root) else path
