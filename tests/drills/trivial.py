"""Grids of trivial cells (tests/plugins/qgrid_trivial): real stages, milliseconds, no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qgrid import registry, sweep
from qgrid.files import HashCache
from qgrid.planning import plan
from qgrid.planning.facts import Facts
from qgrid.types import (
    Calibration,
    Choice,
    Gpu,
    KvCache,
    Limits,
    Method,
    Model,
    PlannedCell,
    Prose,
    Runtime,
    Settings,
    Slice,
    Slices,
    Tracking,
    Workload,
)

PLUGINS = Path(__file__).parents[1] / "plugins"
FOLDER = PLUGINS / "qgrid_trivial"
CONF = FOLDER / "conf"  # for `--config-dir` of a command line
MODEL = Model("trivial", str(FOLDER / "model"), None, False, False)
SLICES = Slices(
    "trivial",
    Prose("package:qgrid_trivial/prose.txt", None),
    {"colours": Slice("package:qgrid_trivial/colours.jsonl", "choice", False, None, 2)},
)
AUTO = Gpu("auto", "cpu", "", None, 0.0, None, 1)
LEDGER = "QGRID_TRIVIAL_LEDGER"


def variables(**more: str) -> dict[str, str]:
    """The environment of a process that knows the plugin and never loads torch."""
    path = os.pathsep.join([str(FOLDER / "stand_ins"), str(PLUGINS)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the plugin known, here and in the processes started from here."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("PYTHONPATH", variables()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    registry.names.cache_clear()


def choice(
    bits: int = 16,
    *,
    number: int = 0,
    pause: float = 0.0,
    quality_pause: float = 0.0,
    speed_pause: float = 0.0,
    load: int = 0,
    context: int = 32,
    gpu: Gpu = AUTO,
) -> Choice:
    """A trivial point; pauses are seconds, `number` is another artifact, `load` another timing."""
    return Choice(
        model=MODEL,
        method=Method("trivial", {"pause": pause, "number": number}),
        bits=bits,
        runtime=Runtime(
            "trivial",
            "float32",
            "bfloat16",
            1,
            {"quality_pause": quality_pause, "speed_pause": speed_pause},
        ),
        gpu=gpu,
        kv_cache=KvCache("auto16", 16),
        calibration=Calibration("none", None, "none", None, "train", "text", 1, 1),
        slices=SLICES,
        workload=Workload(f"trivial{load}", 4, 4 + load, (1,), 0, 2),
        context=context,
        seed=0,
    )


def settings(store: Path, **changes: Any) -> Settings:
    """Settings of a sweep called `trivial` in `store`."""
    plain: dict[str, Any] = {
        "name": "trivial",
        "out": str(store),
        "rerun": (),
        "fresh": False,
        "verify": "cached",
        "limits": Limits(600.0, 600.0, 600.0),
        "tracking": Tracking("none", "qgrid", None),
    }
    return Settings(**(plain | changes))


def planned(choices: Iterable[Choice], store: Path) -> list[PlannedCell]:
    """The plan of a grid as the command line makes it, baselines added."""
    return plan.build(choices, Facts(HashCache(store / "hashes.json")))


def write(
    choices: Iterable[Choice], store: Path, **changes: Any
) -> tuple[Path, Sequence[PlannedCell]]:
    """Write the plan of a sweep; its folder and its cells."""
    cells = planned(choices, store)
    plan_file = sweep.write_plan(cells, settings(store, **changes))
    return plan_file.parent, cells


def command(folder: Path) -> list[str]:
    """A process of its own that runs a written sweep as its launcher does (here: `local`)."""
    run = (
        "import sys, pathlib; from qgrid import launchers; folder = pathlib.Path(sys.argv[1]); "
        "sys.exit(launchers.launch(folder, launchers.chosen(folder), False))"
    )
    return [sys.executable, "-c", run, str(folder)]


def words(store: Path, *more: str) -> list[str]:
    """A command line that plans and runs a trivial grid in `store`; `more` are its axes."""
    return [
        sys.executable,
        *("-m", "qgrid", "--config-dir", str(CONF)),
        *("model=trivial", f"model.id={MODEL.id}", "method=trivial", "runtime=trivial"),
        *("slices=trivial", "workload=trivial", "context=32", "tracking=none", f"out={store}"),
        *more,
    ]


def ledger(file: Path) -> list[dict[str, Any]]:
    """What the stages have noted, in the order of the notes."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]
