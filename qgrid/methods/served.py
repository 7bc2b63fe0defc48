"""What an endpoint serves: not made here, so that only its configuration and tokenizer are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.types import Cell, MethodSupport

_BITS = (16, 8, 6, 5, 4, 3, 2)

SUPPORTS = MethodSupport(
    bits=_BITS,
    default_bits=16,
    produces=dict.fromkeys(_BITS, "served"),
    packages=(),
    calibrated=False,
    stores_weights=False,
)


@dataclass(frozen=True)
class Options:
    """No options."""


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Copy configuration and tokenizer of `source` into `out`; the weights are at the server."""
    _checkpoint.copy_configs(source, out)
    _checkpoint.copy_tokenizer(source, out)
    return Built()
