"""Which engines a stage loads, and whether two of them fit into memory together."""

from __future__ import annotations

import dataclasses
import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import registry
from qgrid.types import KvCache, Method

if TYPE_CHECKING:
    from qgrid.contracts import Engine
    from qgrid.types import Cell, Job

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ROOM = 1.2  # activations and rows beside the weights


@dataclass
class Phases:
    """Seconds of own work by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the block's time to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def load(folder: str | Path, cell: Cell, dtype: str) -> Engine:
    """The engine of the cell's runtime."""
    return registry.runtime(cell.runtime.name).load(Path(folder), cell, dtype)


def baseline_cell(cell: Cell) -> Cell:
    """The cell that quality compares with: 16-bit weights and a 16-bit KV cache."""
    return dataclasses.replace(
        cell, method=Method("none", {}), bits=16, kv_cache=KvCache("auto16", 16), calibration=None
    )


def is_baseline(job: Job) -> bool:
    """Whether the job's cell is its own baseline."""
    if job.baseline is None:
        return True
    same = Path(job.baseline).resolve() == Path(job.artifact).resolve()
    return same and job.planned.cell.kv_cache.bits >= 16


def fit_together(baseline: Path, cell: Cell) -> bool:
    """Whether two models of the baseline's size fit into what is free now.

    Packed weights unpack to the compute dtype at the latest while computing, so both count in full.
    """
    each = num_parameters(baseline) * _DTYPE_BYTES[cell.runtime.dtype]
    return _free_bytes(cell) >= _ROOM * 2 * each


def num_parameters(folder: Path) -> int:
    """Numbers stored in a 16-bit checkpoint, from the headers of its safetensors files."""
    return sum(
        _product(entry["shape"])
        for path in folder.glob("*.safetensors")
        for name, entry in _header(path).items()
        if name != "__metadata__"
    )


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    return header


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _free_bytes(cell: Cell) -> int:
    if cell.gpu.kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
