"""Linear layers of a loaded torch model: one file for each library that multiplies them.

A file offers `claims(module) -> bool`, whether a layer is one of its own; `stored(module, plain) ->
Stored`, how its weight is held now; `kernel(module, dtype) -> Kernel`, what multiplies it; and
`FORMATS`, the formats of stored layers (`qgrid.layouts`) that end in it. It may offer
`arrived(module) -> Stored`, how the weight came out of the file where loading packs it anew;
`compute_in(module, dtype)`, which makes a layer compute in a dtype where the checkpoint's own would
win otherwise; `ADAPTED`, those of its formats beside which PEFT keeps an adapter without another
error, and `ADAPTED_DORA`, beside which one whose rows have lengths of their own; and `PACKAGES`,
whose objects may hide tensors. Nothing here imports its library.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any

_DENSE = "dense"  # what no other file claims


@dataclass(frozen=True)
class Stored:
    """How one linear layer is held: `bits` is 16 or 32 where nothing quantized it."""

    format: str
    bits: int


@dataclass(frozen=True)
class Kernel:
    """What multiplies a layer. `dtype` is that of the products."""

    method: str  # the library, "none" for ordinary weights
    scheme: str  # bits of weights and activations: W4A16
    kernel: str  # "dense": a product of unpacked weights
    dtype: str


def multiplies(module: Any) -> bool:
    """Whether a module is a linear layer, of torch or of a library; not what only holds one."""
    import torch

    if hasattr(module, "base_layer"):  # an adapter's, called as the class of the layer within
        return False
    return isinstance(module, torch.nn.Linear) or _family(module) is not _module(_DENSE)


def stored(module: Any, plain: str | None = None) -> Stored:
    """How the layer's weight is held now. Ask before the first forward pass unpacks it.

    `plain` names the dtype of an unquantized weight in the file, when loading has cast it.
    """
    found: Stored = _family(module).stored(module, plain)
    return found


def arrived(module: Any, plain: str | None = None) -> Stored:
    """How the layer's weight came out of the file; `plain` as in `stored`."""
    own = getattr(_family(module), "arrived", None)
    found: Stored = stored(module, plain) if own is None else own(module)
    return found


def kernel(module: Any, dtype: str) -> Kernel:
    """What multiplies a layer that is given activations of `dtype`."""
    found: Kernel = _family(module).kernel(module, dtype)
    return found


def compute_in(module: Any, dtype: str) -> None:
    """Make a layer compute in `dtype`, where its library would take another."""
    own = getattr(_family(module), "compute_in", None)
    if own is not None:
        own(module, dtype)


@cache
def formats() -> tuple[str, ...]:
    """The formats of stored layers that some file's layers come from."""
    every = (_module(_DENSE), *_families())
    return tuple(name for each in every for name in each.FORMATS)


@cache
def adapted(dora: bool = False) -> tuple[str, ...]:
    """The formats beside whose layers an adapter can be kept, or one of DoRA's."""
    named = "ADAPTED_DORA" if dora else "ADAPTED"
    every = (_module(_DENSE), *_families())
    return tuple(name for each in every for name in getattr(each, named, ()))


@cache
def packages() -> tuple[str, ...]:
    """Import names of libraries whose objects may hide tensors."""
    return tuple(name for each in _families() for name in getattr(each, "PACKAGES", ()))


def _family(module: Any) -> Any:
    for each in _families():
        if each.claims(module):
            return each
    return _module(_DENSE)


@cache
def _families() -> tuple[Any, ...]:
    """All but `dense`, which every other file goes before."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(_module(name) for name in names if name != _DENSE)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
