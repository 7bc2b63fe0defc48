"""What a sweep's numbers come from: files by their hashes, and versions that its locks pin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qgrid import models, registry
from qgrid.calibration import calibration_identity
from qgrid.envs import locks
from qgrid.files import HashCache
from qgrid.lora import adapters
from qgrid.reproduction.lock import Hashes, Inputs, Parts
from qgrid.types import Calibration, Cell, DeviceKind, Method, Model, Slices

T = TypeVar("T")
_SHA256 = 64  # hexadecimal digits


def read(parts: Parts, cache: HashCache) -> tuple[Inputs, list[str]]:
    """Hashes of everything that the parts name, and a sentence for each that is not there."""
    missing: list[str] = []

    def each(
        group: str, values: Mapping[str, T], of: Callable[[T, HashCache, list[str]], Hashes]
    ) -> dict[str, Hashes]:
        hashes = {}
        for name, value in values.items():
            sentences: list[str] = []
            hashes[name] = of(value, cache, sentences)
            missing.extend(f"`{group}={name}`: {sentence}" for sentence in sentences)
        return hashes

    inputs = Inputs(
        models=each("model", parts.models, _model),
        methods=each("method", parts.methods, _method),
        calibrations=each("calibration", parts.calibrations, _calibration),
        slices=each("slices", parts.slices, _slices),
    )
    return inputs, missing


def pins(cells: Iterable[Cell]) -> dict[str, dict[str, str]]:
    """By lock: what it pins, of every environment that builds or runs one of the cells."""
    used: dict[tuple[str, DeviceKind], None] = {}
    for cell in cells:
        names = (
            registry.support(cell.method).environment,
            registry.runtime(cell.runtime.name).LOADS.environment,
        )
        used.update(dict.fromkeys((name, cell.gpu.kind) for name in names))
    named = {locks.lock_name(name, kind): (name, kind) for name, kind in used}
    return {lock: dict(locks.pins(*key)) for lock, key in sorted(named.items())}


def _model(model: Model, cache: HashCache, missing: list[str]) -> dict[str, str | None]:
    """Files of a checkpoint and its adapter; of what is on the hub alone nothing is known."""
    return _checkpoint(model, cache, missing) | _adapter(model, cache, missing)


def _adapter(model: Model, cache: HashCache, missing: list[str]) -> dict[str, str | None]:
    if model.adapter is None:
        return {}
    try:
        folder = adapters.located(model)
    except (models.ModelNotFound, OSError) as error:
        missing.append(str(error))
        return {}
    if folder is None:
        if models.is_path(model.adapter):
            missing.append(
                f"no folder `{model.adapter}`; correct the path or put the adapter there"
            )
        return {}
    hashes = {path.name: _hash(path, cache) for path in adapters.files(folder)}
    return {f"{adapters.FOLDER}/{name}": value for name, value in hashes.items()}


def _checkpoint(model: Model, cache: HashCache, missing: list[str]) -> dict[str, str | None]:
    is_path = model.id.startswith((".", "/", "~"))
    try:
        folder = models.located(model)
    except (models.ModelNotFound, OSError) as error:
        missing.append(str(error))
        return {}
    if folder is None:
        if is_path:
            missing.append(f"no folder `{model.id}`; correct the path or put the checkpoint there")
        return {}
    files = models.checkpoint_files(folder, model.allow_pickle)
    commit = {"commit": folder.name} if folder.parent.name == "snapshots" else {}
    return {**commit, **{path.name: _hash(path, cache) for path in files}}


def _hash(path: Path, cache: HashCache) -> str:
    """The hash of a file; a hub's cache names large files by it, so they need not be read."""
    target = path.resolve()
    in_hub = path.is_symlink() and target.parent.name == "blobs"
    return target.name if in_hub and len(target.name) == _SHA256 else cache.sha256(path)


def _method(method: Method, cache: HashCache, missing: list[str]) -> dict[str, str | None]:
    identity = getattr(registry.method(method.name), "identity", None)
    if identity is None:
        return {}
    try:
        return {str(name): str(value) for name, value in identity(method.options, cache).items()}
    except (ValueError, OSError) as error:
        missing.append(" ".join(str(error).split()))
        return {}


def _calibration(
    calibration: Calibration, cache: HashCache, missing: list[str]
) -> dict[str, str | None]:
    try:
        identity: Mapping[str, Any] = calibration_identity(calibration, cache)
    except OSError as error:
        missing.append(str(error))
        return {"sha256": None}
    content = ("sha256", "dataset", "revision", "split")
    return {key: identity[key] for key in content if identity.get(key) is not None}


def _slices(slices: Slices, cache: HashCache, missing: list[str]) -> dict[str, str | None]:
    paths = {f"items.{name}": each.path for name, each in slices.items.items()}
    if slices.prose is not None:
        paths["prose"] = slices.prose.path
    hashes: dict[str, str | None] = {}
    for name, path in paths.items():
        try:
            hashes[name] = cache.sha256(models.resource(path))
        except OSError as error:
            missing.append(str(error))
            hashes[name] = None
    return hashes
