"""`.gguf` files that somebody else made: linked, and compared with the base they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import hub, models, phrases
from qgrid.contracts import Built, InvalidEngine, Unsupported
from qgrid.gguf import audit, base_tensors, convert, layers
from qgrid.gguf import file as gguf_file
from qgrid.gguf.constants import check_constants
from qgrid.gguf.types import FILE_TYPES, TENSOR_TYPES, FileType, named, stored_as
from qgrid.methods import _checkpoint, gguf
from qgrid.types import Cell, Check

if TYPE_CHECKING:
    from qgrid.files import HashCache

_HUB_PARTS = 3  # ORG/NAME/FILE


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that the file's header tells, or its name while it is not on this machine."""
    kind = _kind(options["path"])
    return None if kind is None else kind.bits


def identity(options: Mapping[str, Any], hashes: HashCache) -> dict[str, str]:
    """The content of a local file; a file on the hub is known by its path and revision."""
    path = options["path"]
    if _on_hub(path):
        return {"path": path}
    return {"sha256": hashes.sha256(_local(path))}


def refusal(cell: Cell) -> str | None:
    """Why the file or its base cannot be used; None if they can, or are not on this machine."""
    path = cell.method.options["path"]
    file = _found(path)
    torn = None if file is None else _torn(file)
    if torn is not None:
        return f"`method.path={path}` is no whole file: {torn}"
    kind = _kind(path)
    if kind is None:
        return f"`method.path={path}` {_untold(path)} (known: {', '.join(FILE_TYPES)})"
    if kind.bits != cell.bits:
        return (
            f"`method.path={path}` is {kind.name}, of {kind.bits} bits, not `bits={cell.bits}`; "
            "leave `bits` out"
        )
    source = models.located(cell.model)
    # Without the architecture there are no names to compare layer by layer.
    return None if source is None else convert.refusal(source)


def mismatch(cell: Cell) -> str | None:
    """What a file on this machine holds instead of the type that it claims to be."""
    options = cell.method.options
    file, source, kind = _found(options["path"]), models.located(cell.model), _kind(options["path"])
    if file is None or source is None or kind is None or options["accept_fallback"]:
        return None
    if refusal(cell) is not None:
        return None
    header = _header(file, file.stat().st_mtime_ns)
    wrong = audit.faults(header, kind, layers.places(source))
    if not wrong:
        return None
    return (
        f"`method.path={options['path']}` is no {kind.name}: {phrases.first(wrong)}; use another "
        "file, or `method.accept_fallback=true` to measure it as it is"
    )


def bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of a whole large model, embedding and head included."""
    kind = _kind(options["path"])
    return float(bits) if kind is None else kind.bits_per_weight


def stored_bits(
    bits: int, options: Mapping[str, Any], rows: int, columns: int
) -> tuple[float, float]:
    """Lowest and highest bits per weight of a layer in any type of this width."""
    kinds = {kind for each in FILE_TYPES.values() if each.bits == bits for kind in each.mix}
    if options["accept_fallback"]:
        kinds |= {stored_as(kind, columns) for kind in kinds}
        kinds |= TENSOR_TYPES.keys() - {"I8", "I16", "I32", "I64", "F64"}
    widths = [TENSOR_TYPES[kind].bits for kind in kinds]
    return min(widths), max(widths)


def checks(folder: Path, cell: Cell) -> Sequence[Check]:
    """The audit of every linear layer's type, by the type that the file's name tells."""
    header = gguf_file.read(folder / gguf.FILE)
    kind = named(Path(cell.method.options["path"]).name) or audit.stated(header)
    if kind is None:
        return (Check("types", False, "a known GGUF type", "an unknown one"),)
    accepted = cell.method.options["accept_fallback"]
    return (audit.check_types(header, kind, layers.places(folder), accepted),)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Link the file into `out` beside config and tokenizer of its base, and compare the two.

    Raises:
        Unsupported: no such file, or a base that the converter does not know.
        InvalidEngine: the file is of another type than it says, and the cell does not accept it.
    """
    path = cell.method.options["path"]
    file = _download(path) if _on_hub(path) else _local(path)
    for error, reason in ((Unsupported, refusal(cell)), (InvalidEngine, mismatch(cell))):
        if reason is not None:
            raise error(reason)
    (out / gguf.FILE).symlink_to(file.resolve())
    _checkpoint.copy_tokenizer(source, out)
    _checkpoint.copy_configs(source, out)
    return Built(checks=_verdicts(file, source))


def _verdicts(file: Path, source: Path) -> tuple[Check, ...]:
    """Tensors, constants, vocabulary and tokenizer against the base."""
    from qgrid.gguf import parity

    shapes = base_tensors.check_shapes(file, source)
    if not shapes.ok:
        return (shapes,)
    found = (
        shapes,
        base_tensors.check_weights(file, source),
        check_constants(file, source),
        parity.check_vocabulary(file, source),
    )
    if not all(check.ok for check in found):
        return found
    encoding = [replace(c, name=f"gguf_{c.name}") for c in parity.check_tokenizer(file, source)]
    return (*found, *encoding, parity.check_chat_template(file, source))


# --- where the file is ---------------------------------------------------------------------------


def _kind(path: str) -> FileType | None:
    """The type that the file's name claims; its header's where the name tells none."""
    file, told = _found(path), named(Path(path).name)
    if file is None or told is not None or _torn(file) is not None:
        return told
    return audit.stated(_header(file, file.stat().st_mtime_ns))


@cache
def _header(file: Path, _changed: int) -> gguf_file.Header:
    return gguf_file.read(file)


def _torn(file: Path) -> str | None:
    """What is wrong with the file itself, and what to do about it."""
    try:
        header = _header(file, file.stat().st_mtime_ns)
    except gguf_file.TornFile as error:
        return f"{error}; get it again"
    parts = header.metadata.get("split.count", 0)  # 0 and 1: it was never split
    if parts > 1:
        return f"it is one of {parts} parts; join them with `llama-gguf-split --merge`"
    return None


def _untold(path: str) -> str:
    if _found(path) is None:
        return "names no GGUF type; download the file and give its place"
    return "is of a GGUF type that is not audited here; use another file"


def _on_hub(path: str) -> bool:
    """Whether a path is one on the hub: three parts or more, and no such local file."""
    plain = not path.startswith((".", "/", "~")) and path.count("/") >= _HUB_PARTS - 1
    return plain and _exists(path) is None


def _exists(path: str) -> Path | None:
    try:
        return models.resource(path)
    except FileNotFoundError:
        return None


def _local(path: str) -> Path:
    """A local file.

    Raises:
        FileNotFoundError: one sentence with the places that were looked at.
    """
    try:
        return models.resource(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`method.path`: {error}, or give a file on the hub as ORG/NAME/FILE.gguf"
        ) from None


def _found(path: str) -> Path | None:
    """The file where it is on this machine already, without network."""
    local = _exists(path)
    if local is not None or not _on_hub(path):
        return local
    from huggingface_hub import try_to_load_from_cache

    repository, revision, name = _hub_parts(path)
    place = try_to_load_from_cache(repository, name, revision=revision)
    return Path(place) if isinstance(place, str) else None


def _download(path: str) -> Path:
    """A file of the hub, from the cache or the network.

    Raises:
        Unsupported: there is no such file.
        Unreachable: the hub does not answer.
    """
    from huggingface_hub import hf_hub_download

    repository, revision, name = _hub_parts(path)
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except hub.errors() as error:
        absent = (
            f"`method.path={path}` is neither a local file nor one on the hub; give a path or "
            "ORG/NAME/FILE.gguf"
        )
        raise hub.failure(error, path, absent) from error


def _hub_parts(path: str) -> tuple[str, str | None, str]:
    """Repository, revision and file of `ORG/NAME@REVISION/FILE.gguf`."""
    organisation, name, file = path.split("/", 2)
    name, _, revision = name.partition("@")
    return f"{organisation}/{name}", revision or None, file
