"""A method that writes a few numbers beside configuration and tokenizer, in two halves."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qgrid_trivial
from qgrid import codec
from qgrid.contracts import Built
from qgrid.types import Cell, MethodSupport

BITS = (16, 8, 6, 5, 4, 3, 2)
LEVELS = "levels.txt"
NUMBERS = 256

SUPPORTS = MethodSupport(
    bits=BITS,
    default_bits=16,
    produces=dict.fromkeys(BITS, "trivial"),
    packages=(),
    calibrated=False,
    stores_weights=False,
)
UNQUANTIZED: Mapping[str, Any] = {"pause": 0.0, "number": 0}


@dataclass(frozen=True)
class Options:
    """`pause`: seconds between the halves; `number`: makes as many artifacts as are wanted."""

    pause: float
    number: int


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    name = codec.digest([cell.model, cell.method, cell.bits])
    qgrid_trivial.note(stage="artifact", event="begin", cell=name)
    for path in source.iterdir():
        shutil.copy(path, out / path.name)
    seed = codec.digest([cell.model.name, cell.method, cell.bits])  # wherever the model lies
    levels = [hashlib.sha256(f"{seed} {place}".encode()).hexdigest() for place in range(NUMBERS)]
    with (out / LEVELS).open("w") as file:
        file.write("".join(f"{level}\n" for level in levels[: NUMBERS // 2]))
        file.flush()
        time.sleep(cell.method.options["pause"])
        file.write("".join(f"{level}\n" for level in levels[NUMBERS // 2 :]))
    (out / "widths.json").write_text(json.dumps({"bits": cell.bits}))
    qgrid_trivial.note(stage="artifact", event="end", cell=name)
    return Built()
