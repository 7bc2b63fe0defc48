"""GPTQ: column by column, each rounding error pushed onto the columns that are still to come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.methods import _gptqmodel as native
from qgrid.methods import _llmcompressor as llmc
from qgrid.methods import _optimum as optimum
from qgrid.methods import _packed as packed
from qgrid.types import Cell, MethodSupport

SUPPORTS = packed.supports(calibrated=True)
option_bits = packed.option_bits
_NATIVE: native.Layout = "gptq"
_is_native = partial(native.is_native, _NATIVE)
stored_bits = partial(native.stored_bits, _NATIVE)
_BLOCK = 128  # columns that gptqmodel treats before errors are pushed to the rest
_AUTO = "auto"
_LIBRARIES = {  # the first of a format is its own choice
    "compressed-tensors": ("llmcompressor",),
    "gptq": ("gptqmodel", "optimum"),
}


@dataclass(frozen=True)
class Options(packed.Options):
    """`format` is the checkpoint's, `library` what makes it: `auto` the first that can."""

    format: Literal["compressed-tensors", "gptq"]
    library: Literal["auto", "llmcompressor", "gptqmodel", "optimum"]
    dampening: PositiveFloat
    block_size: PositiveInt
    activation_order: Literal["static", "weight"] | None


def support(options: Mapping[str, Any]) -> MethodSupport:
    """What is made in the format that is asked for."""
    return native.supports(_NATIVE, packed.BITS) if _is_native(options) else SUPPORTS


def resolved(bits: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the library that makes the format where none is named."""
    return {**options, "library": _library(options)}


def _library(options: Mapping[str, Any]) -> str:
    asked = str(options["library"])
    return _LIBRARIES[options["format"]][0] if asked == _AUTO else asked


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    options = cell.method.options
    if reason := _unmatched(options):
        return reason
    if not _is_native(options):
        return packed.refusal(cell)
    return _fixed(options) or native.refusal(cell, _NATIVE)


def _unmatched(options: Mapping[str, Any]) -> str | None:
    """A library that does not write the format."""
    has = _LIBRARIES[options["format"]]
    if _library(options) in has:
        return None
    return (
        f"`method.library={options['library']}` does not write `method.format={options['format']}` "
        f"(has: {', '.join(has)}); change one of the two"
    )


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or cannot be stored so.
    """
    _checkpoint.refuse(_unmatched(cell.method.options))
    if _is_native(cell.method.options):
        return _quantize_native(cell, source, out)
    options = Options(**cell.method.options)

    def recipe(arguments: Mapping[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [
            GPTQModifier(
                **arguments,
                dampening_frac=options.dampening,
                block_size=options.block_size,
                actorder=options.activation_order,
            )
        ]

    packed.refuse(cell, source)
    scheme = partial(packed.scheme, options=cell.method.options)
    with _noted_fallbacks() as names:
        built = llmc.quantize(cell, source, out, scheme, recipe)
    return replace(built, module_methods=dict.fromkeys(names, "rtn"))


@contextmanager
def _noted_fallbacks() -> Iterator[list[str]]:
    """Names of the layers whose Hessian could not be factorized, so that they were just rounded.

    The modifier forgets them when it finishes; they are read just before.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier

    names: list[str] = []
    finish = GPTQModifier.on_finalize

    def noting(self: Any, *args: Any, **arguments: Any) -> Any:
        names.extend(self._rtn_fallback_module_names)
        return finish(self, *args, **arguments)

    GPTQModifier.on_finalize = noting
    try:
        yield names
    finally:
        GPTQModifier.on_finalize = finish


# --- the native format ---------------------------------------------------------------------------


def _fixed(options: Mapping[str, Any]) -> str | None:
    """Which option the native format's libraries do not have."""
    if options["block_size"] != _BLOCK:
        return (
            f"`method.block_size={options['block_size']}` is not there in "
            f"`method.format={_NATIVE}` (has: {_BLOCK}); leave it out or use "
            "`method.format=compressed-tensors`"
        )
    if options["dampening"] >= 1:
        return (
            f"`method.dampening={options['dampening']}` is not there in `method.format={_NATIVE}` "
            "(has: less than 1); use less or `method.format=compressed-tensors`"
        )
    return optimum.refusal(options) if _library(options) == "optimum" else None


def _quantize_native(cell: Cell, source: Path, out: Path) -> Built:
    options = Options(**cell.method.options)
    _checkpoint.refuse(_fixed(cell.method.options))
    if _library(cell.method.options) == "optimum":
        return optimum.quantize(cell, source, out, options.dampening)
    ordered = options.activation_order is not None
    arguments = {
        "damp_percent": options.dampening,
        "desc_act": ordered,
        "static_groups": ordered,  # scales first, by the order of the file: both names mean that
    }
    return native.quantize(cell, source, out, native.Recipe(_NATIVE, arguments, _rounded))


def _rounded(model: Any, arguments: Mapping[str, Any]) -> Sequence[str]:
    """Run the library's GPTQ; names of the layers that it could only round.

    Those that calibration hardly reached, and those whose Hessian could not be factorized.
    """
    log = model.quantize(**arguments)
    told = [entry for entries in log.values() for entry in entries]
    ends = [
        f".{entry['layer']}.{entry['module']}" for entry in told if "fallback" in str(entry["loss"])
    ]
    return [name for name, _ in model.model.named_modules() if name.endswith(tuple(ends))]
