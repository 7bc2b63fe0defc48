"""AWQ: scale the channels that activations use most before rounding, and fold the scales away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.methods import _gptqmodel as native
from qgrid.methods import _llmcompressor as llmc
from qgrid.methods import _packed as packed
from qgrid.types import Cell, MethodSupport

SUPPORTS = packed.supports(calibrated=True)
option_bits = packed.option_bits
_NATIVE: native.Layout = "awq"
_is_native = partial(native.is_native, _NATIVE)
stored_bits = partial(native.stored_bits, _NATIVE)
_NATIVE_BITS = (4,)
_FIXED = {"duo_scaling": True, "grid_points": 20}  # of gptqmodel's search


@dataclass(frozen=True)
class Options(packed.Options):
    """`format` is the checkpoint's, and with it the library that makes it.

    gptqmodel's search, of the format `awq`, also clips the largest weights of a group.
    """

    format: Literal["compressed-tensors", "awq"]
    duo_scaling: bool
    grid_points: PositiveInt


def support(options: Mapping[str, Any]) -> MethodSupport:
    """What is made in the format that is asked for."""
    return native.supports(_NATIVE, _NATIVE_BITS) if _is_native(options) else SUPPORTS


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    options = cell.method.options
    if not _is_native(options):
        return packed.refusal(cell)
    return _fixed(options) or native.refusal(cell, _NATIVE)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or cannot be stored so.
    """
    if _is_native(cell.method.options):
        _checkpoint.refuse(_fixed(cell.method.options))
        return native.quantize(cell, source, out, native.Recipe(_NATIVE, {}, _rounded))
    options = Options(**cell.method.options)

    def recipe(arguments: Mapping[str, Any]) -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        search = _search()(duo_scaling=options.duo_scaling, n_grid=options.grid_points)
        return [search, QuantizationModifier(**arguments)]

    packed.refuse(cell, source)
    scheme = partial(packed.scheme, options=cell.method.options)
    return llmc.quantize(cell, source, out, scheme, recipe)


def _search() -> Any:
    """llmcompressor's search, without the places where every layer stays at 16 bits.

    There it would divide by a number of weights that is zero.
    """
    from llmcompressor.modifiers.transform.awq import AWQModifier

    class Search(AWQModifier):  # type: ignore[misc]
        def _set_resolved_mappings(self, model: Any) -> None:
            super()._set_resolved_mappings(model)
            self._resolved_mappings: list[Any] = [
                mapping
                for mapping in self._resolved_mappings
                if any(hasattr(each, "quantization_scheme") for each in mapping.balance_layers)
            ]

    return Search


# --- the native format ---------------------------------------------------------------------------


def _fixed(options: Mapping[str, Any]) -> str | None:
    """Which option gptqmodel does not have."""
    for key, value in _FIXED.items():
        if options[key] != value:
            return (
                f"`method.{key}={str(options[key]).lower()}` is not there in "
                f"`method.format={_NATIVE}` (has: {str(value).lower()}); leave it out or use "
                "`method.format=compressed-tensors`"
            )
    return None


def _rounded(model: Any, arguments: Mapping[str, Any]) -> Sequence[str]:
    """Run the library's AWQ; names of the layers that calibration hardly reached."""
    from gptqmodel.utils.backend import BACKEND

    with _noted_fallbacks() as names:
        # Its own choice is a kernel for GPUs, also where there is none.
        model.quantize(**arguments, backend=BACKEND.AWQ_TORCH)
    return names


@contextmanager
def _noted_fallbacks() -> Iterator[list[str]]:
    """Names of the layers that are rounded without a search: no scales are given for them."""
    from gptqmodel.looper.awq_processor import AWQProcessor

    names: list[str] = []
    apply = AWQProcessor.apply_quant

    def noting(self: Any, named_linears: Mapping[str, Any], scales_list: Sequence[Any]) -> Any:
        if not scales_list:
            names.extend(module.full_name for module in named_linears.values())
        return apply(self, named_linears, scales_list)

    AWQProcessor.apply_quant = noting
    try:
        yield names
    finally:
        AWQProcessor.apply_quant = apply
