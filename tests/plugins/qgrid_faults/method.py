"""A method that links the checkpoint, after whatever its option asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import qgrid_faults
from qgrid.contracts import Built
from qgrid.types import Cell, MethodSupport

SUPPORTS = MethodSupport(
    bits=(16,),
    default_bits=16,
    produces={16: "safetensors-16bit"},
    packages=(),
    calibrated=False,
)


@dataclass(frozen=True)
class Options:
    act: str


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    (out / "half").write_text("built")
    qgrid_faults.act(cell.method.options["act"])
    (out / "half").unlink()
    for path in source.iterdir():
        (out / path.name).symlink_to(path)
    return Built()
