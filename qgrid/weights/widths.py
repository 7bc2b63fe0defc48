"""Mixed precision: the width of each layer, where `method.keep` gives some their own.

`keep` maps patterns of layer names (`lm_head`, `model.layers.0.*`) to bits; 16 leaves a layer as it
is. Where several patterns match a layer, the longest one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models
from qgrid.weights import inspection

if TYPE_CHECKING:
    from qgrid.types import Cell, Method

UNQUANTIZED = 16
HEAD = "lm_head"  # at 16 bits in every method whose library leaves out layers by name
_AS_IT_IS = (HEAD, UNQUANTIZED)


def of(bits: int, options: Mapping[str, Any], layer: str) -> int:
    """The width that a linear layer is to have where the method's is `bits`."""
    named = pattern(options, layer)
    return bits if named is None else int(options["keep"][named])


def pattern(options: Mapping[str, Any], layer: str) -> str | None:
    """The pattern of `keep` that counts for a layer; None: none names it."""
    found = [each for each in options.get("keep") or {} if fnmatchcase(layer, each)]
    return max(found, key=lambda each: (len(each), each)) if found else None


def settled(method: Method) -> Method:
    """The method without what `keep` need not say: one cell for all such choices."""
    keep = method.options.get("keep")
    if keep is None:
        return method
    told = {pattern: bits for pattern, bits in keep.items() if (pattern, bits) != _AS_IT_IS}
    return replace(method, options={**method.options, "keep": told or None})


def unheard(method: Method) -> tuple[str, ...]:
    """A remark where `keep` says nothing, or what would be so without it."""
    keep = method.options.get("keep")
    if keep is None or keep == settled(method).options["keep"]:
        return ()
    said = f"leaves `{HEAD}` at {UNQUANTIZED} bits, where it is anyway" if keep else "is empty"
    return (f"`method.keep` {said}: the same cell as without that",)


def asked(cell: Cell) -> set[int]:
    """Every width that some layer of a cell may be rounded to."""
    keep: Mapping[str, int] = cell.method.options.get("keep") or {}
    return {cell.bits, *keep.values()} - {UNQUANTIZED}


def by_layer(cell: Cell, source: Path) -> dict[str, int]:
    """The width of every linear layer of the 16-bit checkpoint in `source`."""
    layers = inspection.decoder_linears(inspection.read_headers(source))
    return {layer: of(cell.bits, cell.method.options, layer) for layer in layers}


def rounded(cell: Cell, source: Path) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers that are not left at 16 bits."""
    layers = inspection.decoder_linears(inspection.read_headers(source))
    options = cell.method.options
    return {k: v for k, v in layers.items() if of(cell.bits, options, k) < UNQUANTIZED}


def others(cell: Cell, source: Path) -> dict[int, list[str]]:
    """The layers that have another width than the cell's, by their width."""
    found: dict[int, list[str]] = {}
    for layer, bits in by_layer(cell, source).items():
        if bits != cell.bits:
            found.setdefault(bits, []).append(layer)
    return found


def mean(cell: Cell, stored: Callable[[int], float]) -> float:
    """Bits per weight of all linear layers, from those of a width: the cell's own without `keep`.

    The same while the model is not on this machine.
    """
    source = models.known(cell.model) if cell.method.options.get("keep") else None
    if source is None:
        return stored(cell.bits)
    layers = inspection.decoder_linears(inspection.read_headers(source))
    weights = {name: rows * columns for name, (rows, columns) in layers.items()}
    asked = by_layer(cell, source)
    bits = sum(stored(asked[name]) * count for name, count in weights.items())
    return bits / sum(weights.values()) if weights else stored(cell.bits)


def refusal(cell: Cell, allowed: Iterable[int]) -> str | None:
    """Why `method.keep` cannot be had; None if it can, or the model is not on this machine.

    `allowed` are the widths that the method's library can give single layers.
    """
    keep: Mapping[str, int] = cell.method.options.get("keep") or {}
    has = sorted({*allowed, UNQUANTIZED})
    for pattern, bits in keep.items():
        if bits not in has or (pattern == HEAD and bits != UNQUANTIZED):
            can = [UNQUANTIZED] if pattern == HEAD else has
            return (
                f"`method.keep` gives `{pattern}` {bits} bits, which `{cell.method.name}` cannot "
                f"(has: {', '.join(map(str, can))})"
            )
    source = models.known(cell.model)
    if not keep or source is None:
        return None
    return _unmatched(cell, keep, source)


def _unmatched(cell: Cell, keep: Mapping[str, int], source: Path) -> str | None:
    """A pattern that names no layer, or patterns that leave none to the method's own width."""
    widths = by_layer(cell, source)
    for pattern in keep:
        if pattern != HEAD and not any(fnmatchcase(layer, pattern) for layer in widths):
            return (
                f"`method.keep` names `{pattern}`, which matches none of the {len(widths)} linear "
                f"layers (such as `{next(iter(widths), 'none')}`); correct the pattern"
            )
    if widths and cell.bits not in widths.values():
        return (
            f"`method.keep` leaves no layer at `bits={cell.bits}`; set `bits` to the width that "
            "most layers have, or name fewer layers"
        )
    return None
