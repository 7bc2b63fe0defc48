"""Checkpoint folders that somebody else quantized: linked, and compared with their base.

What a method needs that runs such folders; `path` is one of its options. The weights are linked,
the config is the checkpoint's own, the tokenizer the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models, published
from qgrid.contracts import Built, Unreachable, Unsupported
from qgrid.methods import _checkpoint
from qgrid.methods import _prequantized_places as places
from qgrid.planning import estimate
from qgrid.published import Description, Unreadable
from qgrid.types import Cell, Check, MethodSupport, Model
from qgrid.weights import headers, inspection
from qgrid.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    import torch

    from qgrid.files import HashCache

_UNQUANTIZED = 16
_ADDED = "added.safetensors"


def support(options: Mapping[str, Any]) -> MethodSupport | None:
    """What a checkpoint is made of; None while its config is not known, or not understood."""
    found = _described(options["path"])
    if found is None:
        return None
    return MethodSupport(
        bits=(found.bits,),
        default_bits=found.bits,
        produces={found.bits: found.format},
        packages=found.packages,
        calibrated=False,
        from_base=False,
    )


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that the checkpoint's config tells."""
    found = _described(options["path"])
    return None if found is None else found.bits


def identity(options: Mapping[str, Any], hashes: HashCache) -> dict[str, str]:
    """The content of a local folder; a checkpoint on the hub is known by its id and revision.

    Raises:
        FileNotFoundError: there is no such folder, and it is no id of the hub.
    """
    path = options["path"]
    if (folder := places.local(path)) is not None:
        return models.identity(Model("published", str(folder), None, False, False), hashes)
    if not places.on_hub(path):
        raise FileNotFoundError(places.missing(path))
    return {"path": path}


def refusal(cell: Cell) -> str | None:
    """Why the checkpoint cannot be used; None if it can, as far as is known on this machine.

    Raises:
        Unreachable: its config is on the hub, which does not answer.
    """
    path = cell.method.options["path"]
    try:
        config = places.config(path)
        if config is None:
            return places.missing(path)
        found: Description = published.family(config).described(config)
    except Unreadable as error:
        return f"`method.path={path}` {error}; use another checkpoint"
    if found.bits != cell.bits:
        return (
            f"`method.path={path}` is {found.format}, of {found.bits} bits, not "
            f"`bits={cell.bits}`; leave `bits` out"
        )
    local = places.local(path)  # what the hub's cache lacks is fetched when it is used
    return None if local is None else places.fault(path, local)


def bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of the whole model, or of a large layer while only the config is known."""
    path = options["path"]
    if _described(path) is None or (config := places.config(path)) is None:
        return float(bits)  # the cell will be refused
    folder = places.located(path)
    if folder is not None and places.fault(path, folder) is None:
        return _measured(folder)
    highest: float = published.family(config).stored_bits(config, *estimate.LARGE)[1]
    return highest


@cache
def _measured(folder: Path) -> float:
    return inspection.inspect(folder).bits_per_weight


def stored_bits(
    bits: int, options: Mapping[str, Any], rows: int, columns: int
) -> tuple[float, float]:
    """Lowest and highest bits per weight that the checkpoint's config gives a layer."""
    path = options["path"]
    if _described(path) is None or (config := places.config(path)) is None:
        return float(bits), float(bits + 1)
    low, high = published.family(config).stored_bits(config, rows, columns)
    return low, max(high, _UNQUANTIZED) if options["accept_fallback"] else high


def checks(folder: Path, cell: Cell) -> Sequence[Check]:
    """What the checkpoint's kind knows of its own faults."""
    config = published.read(folder)
    own = getattr(published.family(config), "checks", None)
    return () if own is None else tuple(own(folder))


def load(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """The model of an artifact: by its own kind's loader, or transformers alone."""
    from qgrid.libraries import loading

    config = published.read(folder)
    own = getattr(published.family(config), "load", None)
    return (loading.pretrained if own is None else own)(folder, arguments)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Link the checkpoint into `out` with the tokenizer of its base, and compare the two.

    Raises:
        Unsupported: no such checkpoint, or one that is not known here.
        Unreachable: it is on the hub, which does not answer.
    """
    _checkpoint.refuse_quantized(source)
    folder = places.fetched(cell.method.options["path"])
    _checkpoint.refuse(refusal(cell))
    _link(folder, out)
    _checkpoint.copy_configs(folder, out)
    _checkpoint.copy_tokenizer(source, out)
    checks = _verdicts(cell, folder, source)
    if not all(check.ok for check in checks if check.fatal):  # it may not even load
        return Built(checks=checks)
    ids = _checkpoint.probe(source, cell)
    return Built(probe=ids, reference=_reference(cell, out, ids), checks=checks)


def _link(folder: Path, out: Path) -> None:
    """Link the weights, beside what the checkpoint's kind has to add to them.

    Raises:
        Unsupported: something cannot be added.
    """
    config, tensors = published.read(folder), headers.read_headers(folder)
    own = getattr(published.family(config), "added", None)
    try:
        added = {} if own is None else own(config, tensors)
    except Unreadable as error:
        raise Unsupported(f"`method.path={folder}` {error}; use another checkpoint") from None
    files = headers.weight_files(folder)
    if not added:
        for path in [*files, *folder.glob(places.INDEX)]:
            (out / path.name).symlink_to(path.resolve())
        return
    from safetensors.numpy import save_file

    held = dict.fromkeys(added, _ADDED)
    for number, path in enumerate(files, 1):
        name = f"linked-{number}.safetensors"
        (out / name).symlink_to(path.resolve())
        held |= dict.fromkeys(headers.read_header(path), name)
    save_file(added, out / _ADDED, {"format": "pt"})
    told = {"metadata": {}, "weight_map": held}
    (out / places.INDEX).write_text(json.dumps(told), encoding="utf-8")


def _reference(cell: Cell, out: Path, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the checkpoint as transformers loads it.

    Raises:
        Unsupported: it does not, for something that the config says.
    """
    try:
        return _checkpoint.logits(_checkpoint.reload(out, cell), ids)
    except Unsupported:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path, said = cell.method.options["path"], str(error).strip().split("\n")[0]
        raise Unsupported(
            f"`method.path={path}` is not loaded by transformers ({type(error).__name__}: "
            f"{said}); use a checkpoint with another `{published.FILE}`"
        ) from error


def _verdicts(cell: Cell, folder: Path, source: Path) -> tuple[Check, ...]:
    """Architecture, shapes, weights and tokenizer against the base."""
    from qgrid.published import _comparison, _settings

    config = published.read(folder)
    architecture = _settings.check_config(folder, source)
    if not architecture.ok:
        return (architecture,)
    weights = _comparison.Comparison(folder, source, config).checks()
    found = (architecture, *weights)
    if not any((folder / name).is_file() for name in models.TOKENIZER_FILES):
        goal = "the base model's"
        return (*found, Check("vocabulary", False, goal, "no tokenizer", fatal=False))
    tokenizer = _settings.check_tokenizer(fingerprint(folder), fingerprint(source))
    return (*found, *tokenizer)


def _described(path: str) -> Description | None:
    try:
        config = places.config(path)
        return None if config is None else published.family(config).described(config)
    except (Unreadable, Unreachable):
        return None  # said when the cell is refused
