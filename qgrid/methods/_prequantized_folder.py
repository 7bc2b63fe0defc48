"""Checkpoint folders that somebody else quantized: linked, and compared with their base.

What a method needs that runs such folders; `path` is one of its options. The weights are linked,
the config is the checkpoint's own, the tokenizer the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qgrid import headers, inspection, models, published
from qgrid.contracts import Built, Unsupported
from qgrid.fingerprint import fingerprint
from qgrid.methods import _checkpoint
from qgrid.published import Config, Description, Unreadable
from qgrid.types import Cell, Check, MethodSupport, Model

if TYPE_CHECKING:
    from qgrid.files import HashCache

_UNQUANTIZED = 16
_LARGE = (4096, 4096)  # rows and columns of the layer that sizes are planned with
_SINGLE = ("model.safetensors", "model.safetensors.index.json")  # what transformers looks for


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
    if (folder := _local(path)) is not None:
        return models.identity(Model("published", str(folder), None, False, False), hashes)
    if not _on_hub(path):
        raise FileNotFoundError(_missing(path))
    return {"path": path}


def refusal(cell: Cell) -> str | None:
    """Why the checkpoint cannot be used; None if it can, as far as is known on this machine."""
    path = cell.method.options["path"]
    config = _config(path)
    if config is None:
        return _missing(path)
    try:
        found: Description = published.family(config).described(config)
    except Unreadable as error:
        return f"`method.path={path}` {error}; use another checkpoint"
    if found.bits != cell.bits:
        return (
            f"`method.path={path}` is {found.format}, of {found.bits} bits, not "
            f"`bits={cell.bits}`; leave `bits` out"
        )
    return _unloadable(path)


def bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of the whole model, or of a large layer while only the config is known."""
    folder, config = _located(options["path"]), _config(options["path"])
    if folder is not None and headers.weight_files(folder):
        return _measured(folder)
    if config is None:
        return float(bits)
    try:
        return float(published.family(config).stored_bits(config, *_LARGE)[1])
    except published.Unreadable:
        return float(bits)  # the cell will be refused


@cache
def _measured(folder: Path) -> float:
    return inspection.inspect(folder).bits_per_weight


def stored_bits(
    bits: int, options: Mapping[str, Any], rows: int, columns: int
) -> tuple[float, float]:
    """Lowest and highest bits per weight that the checkpoint's config gives a layer."""
    config = _config(options["path"])
    if config is None:
        return float(bits), float(bits + 1)
    low, high = published.family(config).stored_bits(config, rows, columns)
    return low, max(high, _UNQUANTIZED) if options["accept_fallback"] else high


def checks(folder: Path, cell: Cell) -> Sequence[Check]:
    """What the checkpoint's kind knows of its own faults."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = getattr(published.family(config), "checks", None)
    return () if own is None else tuple(own(folder))


def load(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """The model of an artifact: by its own kind's loader, or transformers alone."""
    from qgrid import loading

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = getattr(published.family(config), "load", None)
    return (loading.pretrained if own is None else own)(folder, arguments)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Link the checkpoint into `out` with the tokenizer of its base, and compare the two.

    Raises:
        Unsupported: no such checkpoint, or one that is not known here.
    """
    _checkpoint.refuse_quantized(source)
    folder = _fetched(cell.method.options["path"])
    _checkpoint.refuse(refusal(cell))
    for path in [*headers.weight_files(folder), *folder.glob(_SINGLE[1])]:
        (out / path.name).symlink_to(path.resolve())
    _checkpoint.copy_configs(folder, out)
    _checkpoint.copy_tokenizer(source, out)
    checks = _verdicts(cell, folder, source)
    if not all(check.ok for check in checks if check.fatal):  # it may not even load
        return Built(checks=checks)
    ids = _checkpoint.probe(source, cell)
    model = _checkpoint.reload(out, cell)
    return Built(probe=ids, reference=_checkpoint.logits(model, ids), checks=checks)


def _verdicts(cell: Cell, folder: Path, source: Path) -> tuple[Check, ...]:
    """Architecture, shapes, weights and tokenizer against the base."""
    from qgrid.published import _comparison, _settings

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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


# --- where the checkpoint is ---------------------------------------------------------------------


def _model(path: str) -> Model:
    """The folder or hub id as a model: `ORG/NAME` or `ORG/NAME@REVISION`."""
    local = _local(path)
    name, _, revision = (path, "", "") if local is not None else path.partition("@")
    return Model("published", str(local or name), revision or None, False, False)


def _local(path: str) -> Path | None:
    """A folder with a config, here or in a folder given by `--config-dir`."""
    try:
        return models.resource(f"{path}/config.json").parent
    except FileNotFoundError:
        return None


def _on_hub(path: str) -> bool:
    """Whether a path can be an id of the hub: two parts, and no sign of a file."""
    plain = not path.startswith((".", "/", "~")) and ":" not in path
    return plain and path.partition("@")[0].count("/") == 1 and not path.endswith(".gguf")


def _located(path: str) -> Path | None:
    """The checkpoint where it is on this machine already, without network."""
    if _local(path) is None and not _on_hub(path):
        return None
    return models.located(_model(path))


def _config(path: str) -> Config | None:
    """Its `config.json`: from the folder, else from the hub alone, once."""
    folder = _located(path)
    if folder is not None:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return _config_of_hub(path) if _on_hub(path) else None


@cache
def _config_of_hub(path: str) -> Config | None:
    """A file of few bytes, kept out of the hub's cache, which must not hold half a checkpoint."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    model = _model(path)
    with TemporaryDirectory() as aside:
        try:
            found = hf_hub_download(
                model.id, "config.json", revision=model.revision, local_dir=aside
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None
        return dict(json.loads(Path(found).read_text(encoding="utf-8")))


def _fetched(path: str) -> Path:
    """The checkpoint's folder, from the network where it must be.

    Raises:
        Unsupported: there is none.
    """
    if _local(path) is None and not _on_hub(path):
        raise Unsupported(_missing(path))
    try:
        return models.resolve(_model(path))
    except models.ModelNotFound:
        raise Unsupported(_missing(path)) from None


def _missing(path: str) -> str:
    return (
        f"`method.path={path}` is neither a `.gguf` file, nor a folder with a `config.json`, nor "
        "an id on the hub that can be reached; give a path, ORG/NAME or ORG/NAME@REVISION"
    )


def _unloadable(path: str) -> str | None:
    """Weights that transformers would not find, where the folder is on this machine."""
    folder = _located(path)
    if folder is None or any((folder / name).is_file() for name in _SINGLE):
        return None
    return (
        f"`method.path={path}` has no `{_SINGLE[0]}` and no index of parts, so transformers does "
        "not load it; convert its weights to safetensors of that name"
    )


def _described(path: str) -> Description | None:
    config = _config(path)
    if config is None:
        return None
    try:
        found: Description = published.family(config).described(config)
    except Unreadable:
        return None
    return found
