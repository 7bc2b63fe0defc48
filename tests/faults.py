"""Cells that fail on request, planned by hand; what a test of the controller needs around them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import codec, device, registry
from qgrid.types import (
    Cell,
    KvCache,
    Limits,
    Method,
    Model,
    PlannedCell,
    Runtime,
    Settings,
    Slices,
    Tracking,
    Workload,
)

PLUGINS = Path(__file__).parent / "plugins"
SECONDS = 60.0  # patience of a test on a busy machine; nothing waits for its end


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the faulty method and runtime known, here and in the processes started from here."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("PYTHONPATH", str(PLUGINS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    registry.names.cache_clear()


def cell(
    model: Path,
    act: str = "work",
    quality: str = "work",
    speed: str = "work",
    outputs: int = 2,
    runtime: str = "faulty",
) -> Cell:
    """A cell on this machine whose stages do what is asked."""
    return Cell(
        model=Model("random", str(model), None, False, False),
        method=Method("faulty", {"act": act}),
        bits=16,
        runtime=Runtime(runtime, "float32", "bfloat16", 1, {"quality": quality, "speed": speed}),
        gpu=device.describe(),
        kv_cache=KvCache("auto16", 16),
        calibration=None,
        slices=Slices("none", None, {}),
        workload=Workload(f"out{outputs}", 4, outputs, (1,), 2, 5),
        context=64,
        seed=0,
    )


def planned(cell: Cell, baseline: PlannedCell | None = None) -> PlannedCell:
    """Identities in the manner of the plan: each hashes what its stage depends on."""
    artifact = codec.digest([cell.model, cell.method, cell.bits])
    quality = codec.digest([artifact, cell.runtime, cell.context, cell.slices])
    return PlannedCell(
        cell_id=codec.digest([quality, cell.gpu, cell.workload]),
        artifact_id=artifact,
        quality_id=quality,
        baseline_cell_id=None if baseline is None else baseline.cell_id,
        cell=cell,
        added=False,
    )


def settings(store: Path, limit: float = 600.0, **changes: object) -> Settings:
    """Settings of a sweep in `store`; every stage may take `limit` seconds."""
    plain = Settings(
        name="test",
        out=str(store),
        rerun=(),
        fresh=False,
        verify="cached",
        limits=Limits(limit, limit, limit),
        tracking=Tracking("none", "qgrid", None),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def folder(store: Path) -> Path:
    """The sweep's folder."""
    return store / "sweeps" / "test"


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: object, what: str) -> None:
    """Wait until a callable is true."""
    assert callable(condition)
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup of this machine with a limit; skips the test where it may not be made."""
    for root, name in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup") / root / f"qgrid-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit_bytes))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        try:
            yield group
        finally:
            wait_for(lambda g=group: not (g / "cgroup.procs").read_text(), "an empty cgroup")
            group.rmdir()
        return
    pytest.skip("needs the right to make a memory cgroup")
