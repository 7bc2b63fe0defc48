"""A quantized checkpoint that somebody else made: linked, and compared with the base it came from.

A `.gguf` file, or a folder or hub id whose `config.json` says how it is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.contracts import Built
from qgrid.gguf import PACKAGES
from qgrid.methods import _prequantized_folder as folder
from qgrid.methods import _prequantized_gguf as file
from qgrid.methods import gguf
from qgrid.types import Cell, Check, MethodSupport

if TYPE_CHECKING:
    from qgrid.files import HashCache

SUPPORTS = MethodSupport(
    bits=gguf.BITS,
    default_bits=4,
    produces=dict.fromkeys(gguf.BITS, "gguf"),
    packages=PACKAGES,
    calibrated=False,
    from_base=False,
)
load = folder.load


@dataclass(frozen=True)
class Options:
    """`path` is a local `.gguf` file or folder; on the hub `ORG/NAME/FILE.gguf` or `ORG/NAME`."""

    path: str
    accept_fallback: bool


def _kind(options: Mapping[str, Any]) -> Any:
    return file if options["path"].endswith(".gguf") else folder


def support(options: Mapping[str, Any]) -> MethodSupport:
    """What the checkpoint is; of a folder as its config says."""
    if _kind(options) is file:
        return SUPPORTS
    own = folder.support(options)
    return replace(SUPPORTS, packages=()) if own is None else own  # it will be refused


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that the file's header or its name tells, or the folder's config."""
    found: int | None = _kind(options).option_bits(options)
    return found


def identity(options: Mapping[str, Any], hashes: HashCache) -> dict[str, str]:
    """The content of what is local; what is on the hub is known by path and revision."""
    found: dict[str, str] = _kind(options).identity(options, hashes)
    return found


def refusal(cell: Cell) -> str | None:
    """Why the checkpoint or its base cannot be used; None if they can, as far as is known here."""
    found: str | None = _kind(cell.method.options).refusal(cell)
    return found


def mismatch(cell: Cell) -> str | None:
    """What a `.gguf` file on this machine holds instead of the type that it claims to be."""
    return file.mismatch(cell) if _kind(cell.method.options) is file else None


def bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of a whole model, embedding and head included."""
    found: float = _kind(options).bits_per_weight(bits, options)
    return found


def stored_bits(
    bits: int, options: Mapping[str, Any], rows: int, columns: int
) -> tuple[float, float]:
    """Lowest and highest bits per weight of a layer in a checkpoint of this kind."""
    found: tuple[float, float] = _kind(options).stored_bits(bits, options, rows, columns)
    return found


def checks(artifact: Path, cell: Cell) -> Sequence[Check]:
    """Of a `.gguf` file the audit of every linear layer's type; of a folder its kind's own."""
    found: Sequence[Check] = _kind(cell.method.options).checks(artifact, cell)
    return found


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Link the checkpoint into `out`, and compare it with its base.

    Raises:
        Unsupported: no such checkpoint, one that is not known here, or such a base.
        InvalidEngine: a file of another type than it says, and the cell does not accept it.
    """
    built: Built = _kind(cell.method.options).quantize(cell, source, out)
    return built
