"""AQLM, two bits a weight: a published checkpoint, linked and compared with its base.

qgrid does not make such a checkpoint: choosing codes and codebooks is a training of many GPU hours
by its authors' program. `qgrid.published.aqlm` tells how it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.methods import _prequantized_folder as folder
from qgrid.published.aqlm import PACKAGES
from qgrid.types import Cell, MethodSupport

if TYPE_CHECKING:
    from qgrid.files import HashCache

_FORMAT = "aqlm"
SUPPORTS = MethodSupport(
    bits=(2,),
    default_bits=2,
    produces={2: _FORMAT},
    packages=PACKAGES,
    calibrated=False,
    from_base=False,
)
load = folder.load


@dataclass(frozen=True)
class Options:
    """`path` is a local folder, or `ORG/NAME` or `ORG/NAME@REVISION` on the hub."""

    path: str | None
    accept_fallback: bool


def support(options: Mapping[str, Any]) -> MethodSupport:
    """What the checkpoint is, as its config says."""
    own = None if options["path"] is None else folder.support(options)
    return SUPPORTS if own is None or _FORMAT not in own.produces.values() else own


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that the checkpoint's config tells."""
    return None if options["path"] is None else folder.option_bits(options)


def identity(options: Mapping[str, Any], hashes: HashCache) -> dict[str, str]:
    """The content of a local folder; a checkpoint on the hub is known by its id and revision."""
    return {} if options["path"] is None else folder.identity(options, hashes)


def refusal(cell: Cell) -> str | None:
    """Why there is nothing to run; None if there is, as far as is known on this machine."""
    path = cell.method.options["path"]
    if path is None:
        return (
            "qgrid does not train AQLM codebooks, it runs published ones: set `method.path` to a "
            "folder or to ORG/NAME on the hub, and `model` to the 16-bit checkpoint that it was "
            "made from"
        )
    own = folder.support(cell.method.options)
    if own is not None and _FORMAT not in own.produces.values():
        made = next(iter(own.produces.values()))
        return f"`method.path={path}` is `{made}`, not `{_FORMAT}`; use `method=prequantized`"
    return folder.refusal(cell)


def bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of the whole model, or of a large layer while only the config is known."""
    return float(bits) if options["path"] is None else folder.bits_per_weight(bits, options)


stored_bits = folder.stored_bits


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Link the checkpoint into `out`, and compare it with its base.

    Raises:
        Unsupported: no such checkpoint, or one that is not known here.
    """
    _checkpoint.refuse(refusal(cell))
    return folder.quantize(cell, source, out)
