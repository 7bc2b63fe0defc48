"""GPTQ: column by column, each rounding error pushed onto the columns that are still to come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from qgrid.contracts import Built
from qgrid.methods import _llmcompressor as llmc
from qgrid.methods._llmcompressor import (
    linear_bits_per_weight,
    option_bits,
    refusal,
    stored_bits,
)
from qgrid.types import Cell, MethodSupport

__all__ = [
    "SUPPORTS",
    "Options",
    "linear_bits_per_weight",
    "option_bits",
    "quantize",
    "refusal",
    "stored_bits",
]

BITS = (2, 3, 4, 8)
SUPPORTS = MethodSupport(
    bits=BITS,
    default_bits=4,
    produces=dict.fromkeys(BITS, llmc.FORMAT),
    packages=llmc.PACKAGES,
    calibrated=True,
)


@dataclass(frozen=True)
class Options:
    """`group_size` None: one scale a row. A `scheme` replaces `group_size` and `symmetric`."""

    group_size: PositiveInt | None
    symmetric: bool
    scheme: llmc.Scheme | None
    dampening: PositiveFloat
    block_size: PositiveInt
    activation_order: Literal["static", "weight"] | None


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the packed checkpoint of `source` into `out`."""
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

    with _noted_fallbacks() as names:
        built = llmc.quantize(cell, source, out, recipe)
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
