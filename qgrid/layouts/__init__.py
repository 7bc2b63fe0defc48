"""How quantized linear layers are stored: one file for each family of formats; no torch needed.

A file offers `FORMATS`, the names of its own; `format_of(parts) -> str | None`, the format of a
layer whose tensors are `parts` (by their names within the layer), None if it is none of its own;
and where the folder itself tells how large such a layer is, `shape(parts, read) -> (rows, columns)
| None`, with `read(name)` for the bytes of a tensor. Where it keeps codes in a tensor of any dtype,
`codes(names) -> names`: those.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from qgrid.types import Tensor

Parts = Mapping[str, Tensor]
Read = Callable[[str], bytes]

FLOATS_16 = frozenset({"BF16", "F16"})
FLOATS_32 = frozenset({"F32", "F64"})
FLOATS = FLOATS_16 | FLOATS_32 | {"F8_E4M3", "F8_E5M2"}
MISSING = "missing"
PLAIN = frozenset({"16bit", "32bit", MISSING})  # of layers that nothing has quantized


def format_of(parts: Parts) -> str:
    """How one linear layer is stored, by the names and dtypes of its tensors."""
    for family in _families():
        found: str | None = family.format_of(parts)
        if found is not None:
            return found
    if "weight" not in parts:
        return MISSING
    dtype = parts["weight"].dtype
    if dtype in FLOATS_16:
        return "16bit"
    return "32bit" if dtype in FLOATS_32 else f"quantized-{dtype.lower()}"


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Rows and columns of a quantized layer; None where its tensors do not tell them."""
    for family in _families():
        if family.format_of(parts) is not None:
            own = getattr(family, "shape", None)
            return None if own is None else own(parts, read)
    return None


def codes(names: Iterable[str]) -> frozenset[str]:
    """Tensors among those of a folder whose bytes are codes, though their dtype may be a float."""
    names = tuple(names)
    own = (getattr(family, "codes", None) for family in _families())
    return frozenset(name for each in own if each is not None for name in each(names))


@cache
def _families() -> tuple[Any, ...]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in sorted(names))
