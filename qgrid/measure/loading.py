"""Which engines a stage loads, and whether two of them fit into memory together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qgrid import registry
from qgrid.planning import baseline
from qgrid.weights import inspection

if TYPE_CHECKING:
    from qgrid.contracts import Engine
    from qgrid.types import Cell, Job

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ROOM = 1.4  # activations and rows of both engines beside the weights


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


def is_baseline(job: Job) -> bool:
    """Whether the job's cell is its own baseline."""
    if job.baseline is None:
        return True
    cell = job.planned.cell
    same = Path(job.baseline).resolve() == Path(job.artifact).resolve()
    # of what is served by two endpoints nothing is stored that would tell them apart
    return same and cell.kv_cache.bits >= 16 and baseline.of(cell).runtime == cell.runtime


def fits_beside(folder: Path, cell: Cell, dtype: str) -> bool:
    """Whether the baseline in `dtype` fits into what is free beside the engine that is loaded."""
    return _free_bytes(cell) >= _ROOM * _weight_bytes(folder, cell, dtype)


def _weight_bytes(folder: Path, cell: Cell, dtype: str) -> int:
    """What the weights of a 16-bit artifact take once the cell's runtime has loaded them."""
    if registry.runtime(cell.runtime.name).LOADS.keeps_stored:
        return sum(path.stat().st_size for path in inspection.weight_files(folder))
    parameters = inspection.num_parameters(folder, inspection.read_headers(folder))
    return parameters * DTYPE_BYTES[dtype]


def _free_bytes(cell: Cell) -> int:
    if cell.gpu.kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
