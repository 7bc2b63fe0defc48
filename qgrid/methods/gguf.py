"""GGUF: converted from the checkpoint, quantized by llama.cpp, every tensor's type audited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import device, models
from qgrid.contracts import Built, InvalidEngine, Unsupported
from qgrid.gguf import PACKAGES, audit, base_tensors, convert, importance, layers, quantization
from qgrid.gguf import file as gguf_file
from qgrid.gguf.types import FILE_TYPES, PLAIN, TENSOR_TYPES, FileType, Name, stored_as
from qgrid.methods import _checkpoint
from qgrid.types import Cell, Check, MethodSupport

if TYPE_CHECKING:
    from qgrid.calibration import Drawn

BITS = (2, 3, 4, 5, 6, 8, 16)
FILE = "model.gguf"
SUPPORTS = MethodSupport(
    bits=BITS,
    default_bits=4,
    produces=dict.fromkeys(BITS, "gguf"),
    packages=PACKAGES,
    calibrated=True,
)
_SHOWN = 3


@dataclass(frozen=True)
class Options:
    """`types` gives the `type` that `bits` alone means; `resolved` empties it."""

    type: Name | None
    types: Mapping[int, Name]
    imatrix: bool
    accept_fallback: bool


UNQUANTIZED: Mapping[str, Any] = {
    "type": "F16",
    "types": {},
    "imatrix": False,
    "accept_fallback": False,
}


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that `type` implies, if any."""
    return None if options["type"] is None else FILE_TYPES[options["type"]].bits


def resolved(bits: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the type that `bits` means, and without what a 16-bit type ignores."""
    table = {int(width): name for width, name in options["types"].items()}
    name = options["type"] if options["type"] is not None else table.get(bits)
    plain = name in PLAIN
    return {
        "type": name,
        "types": {},
        "imatrix": options["imatrix"] and not plain,
        "accept_fallback": options["accept_fallback"] and not plain,
    }


def calibrates(options: Mapping[str, Any]) -> bool:
    """Whether these options need the calibration text: for the importance matrix alone."""
    return bool(options["imatrix"]) and options["type"] not in PLAIN


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    options = resolved(cell.bits, cell.method.options)
    if options["type"] is None:
        return (
            f"`method.types` has no type for `bits={cell.bits}`; add one or set `method.type` "
            f"(has: {', '.join(FILE_TYPES)})"
        )
    kind = FILE_TYPES[options["type"]]
    if kind.bits != cell.bits:
        return (
            f"`method.type={kind.name}` is a type of {kind.bits} bits, not `bits={cell.bits}`; "
            "correct `method.types` or drop one of the two"
        )
    if kind.needs_imatrix and not options["imatrix"]:
        return f"`method.type={kind.name}` needs an importance matrix; set `method.imatrix=true`"
    source = models.located(cell.model)
    return None if source is None else convert.refusal(source)


def mismatch(cell: Cell) -> str | None:
    """Which layers would be stored as another type than asked, and two ways out."""
    options = resolved(cell.bits, cell.method.options)
    source = models.located(cell.model)
    if source is None or options["accept_fallback"] or refusal(cell) is not None:
        return None
    return _misfit(source, options["type"], options["imatrix"])


def _misfit(source: Path, name: str, imatrix: bool) -> str | None:
    kind = FILE_TYPES[name]
    bad = audit.misfits(source, kind, imatrix)
    if not bad:
        return None
    first = ", ".join(
        f"{layer} ({columns} columns) would become {stored}"
        for layer, (columns, stored) in list(bad.items())[:_SHOWN]
    )
    other = audit.fitting(source, kind, imatrix)
    use = "another type" if other is None else f"`method.type={other.name}`"
    return (
        f"`method.type={name}` stores rows in blocks of {TENSOR_TYPES[kind.base].block} weights, "
        f"which do not divide the rows of {len(bad)} linear layers: {first}"
        f"{', ...' if len(bad) > _SHOWN else ''}; use {use}, or `method.accept_fallback=true` to "
        "measure what llama.cpp makes of it"
    )


def bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of a whole large model, embedding and head included."""
    name = resolved(bits, options)["type"]
    return float(bits) if name is None else FILE_TYPES[name].bits_per_weight


def stored_bits(
    bits: int, options: Mapping[str, Any], rows: int, columns: int
) -> tuple[float, float]:
    """Lowest and highest bits per weight that the type's mix gives a linear layer."""
    asked = resolved(bits, options)
    kinds = FILE_TYPES[asked["type"]].mix
    if asked["accept_fallback"]:
        kinds |= {stored_as(kind, columns) for kind in kinds}
    widths = [TENSOR_TYPES[kind].bits for kind in kinds]
    return min(widths), max(widths)


def checks(folder: Path, cell: Cell) -> Sequence[Check]:
    """The audit of every linear layer's type."""
    options = resolved(cell.bits, cell.method.options)
    header = gguf_file.read(folder / FILE)
    names = layers.places(folder)
    kind = FILE_TYPES[options["type"]]
    return (audit.check_types(header, kind, names, options["accept_fallback"]),)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write `model.gguf` of `source` into `out`, with its config and tokenizer.

    Raises:
        Unsupported: a checkpoint that the converter does not know.
        InvalidEngine: layers would be stored as another type, and the cell does not accept it.
    """
    _checkpoint.refuse_quantized(source)
    for error, reason in ((Unsupported, refusal(cell)), (InvalidEngine, mismatch(cell))):
        if reason is not None:
            raise error(reason)
    kind = FILE_TYPES[resolved(cell.bits, cell.method.options)["type"]]
    drawn = _drawn(cell, source)
    if kind.name in PLAIN:
        convert.convert(source, out / FILE, "BF16" if kind.name == "BF16" else "F16")
    else:
        _quantized(cell, source, out / FILE, kind, drawn)
    _checkpoint.copy_tokenizer(source, out)
    _checkpoint.copy_configs(source, out)
    return Built(
        calibration=None if drawn is None else drawn.summary,
        checks=_verdicts(cell, source, out / FILE, kind),
    )


def _verdicts(cell: Cell, source: Path, file: Path, kind: FileType) -> tuple[Check, ...]:
    """Tokenizer and weights are the checkpoint's; 16-bit ones compute what the checkpoint does."""
    from qgrid.gguf import parity

    tokenizer = [replace(c, name=f"gguf_{c.name}") for c in parity.check_tokenizer(file, source)]
    found = (*tokenizer, base_tensors.check_weights(file, source))
    if kind.name not in PLAIN:
        return found
    return (*found, parity.check_logits(file, source, cell.model.trust_remote_code))


def _drawn(cell: Cell, source: Path) -> Drawn | None:
    """The calibration text, where the cell's options need it."""
    from qgrid import calibration

    if not calibrates(resolved(cell.bits, cell.method.options)):
        return None
    if cell.calibration is None:
        raise Unsupported("`method.imatrix=true` needs a text; choose one, `calibration=tiny`")
    return calibration.draw(cell.calibration, _checkpoint.tokenizer(source, cell.model), cell.seed)


def _quantized(cell: Cell, source: Path, file: Path, kind: FileType, drawn: Drawn | None) -> None:
    """Convert without loss, hold the dry run against what was asked, quantize."""
    weights = None if drawn is None else _importance(cell, source, drawn)
    with _converted(source, file) as whole:
        accepted = cell.method.options["accept_fallback"]
        if not accepted:
            planned = quantization.plan_types(whole, kind.name, weights)
            _require_mix(planned, kind, layers.places(source))
        threads = cell.runtime.threads
        cores = device.num_cores() if threads is None else threads
        quantization.quantize(whole, file, kind.name, weights, cores)


@contextmanager
def _converted(source: Path, file: Path) -> Iterator[Path]:
    """The checkpoint as a GGUF file in its own dtype, gone after the block."""
    whole = file.with_name(".source.gguf")
    try:
        convert.convert(source, whole, _checkpoint.stored_dtype(source))
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _require_mix(planned: Mapping[str, str], kind: FileType, names: Mapping[str, str]) -> None:
    """The library's own word, should its rules have changed since `mix.py` was written."""
    wrong = {m: planned.get(t) for m, t in names.items() if planned.get(t) not in kind.mix}
    if wrong:
        first = ", ".join(f"{layer} as {stored}" for layer, stored in list(wrong.items())[:_SHOWN])
        raise InvalidEngine(
            f"`method.type={kind.name}`: llama.cpp would store {len(wrong)} linear layers "
            f"otherwise: {first}; use another type or `method.accept_fallback=true`"
        )


def _importance(cell: Cell, source: Path, drawn: Drawn) -> Mapping[str, Any]:
    """Mean squares of the inputs of every linear layer, in fp32 on the cell's device."""
    model = importance.load(source, models.load_options(cell.model), cell.gpu.kind)
    return importance.collect(model, drawn.rows, layers.places(source))
