"""A finished sweep of trivial cells on files of its own, for tests of its lock."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qgrid import launchers
from qgrid.types import Calibration, Model, PlannedCell, Prose, Slice, Slices
from tests.drills import trivial

BITS = (4, 8)


def install(monkeypatch: pytest.MonkeyPatch, tmp: Path) -> None:
    """Make the plugin known; no other test's timing is waited for."""
    trivial.install(monkeypatch)
    monkeypatch.setattr("qgrid.files.machine_locks", lambda: tmp / "machine")


@dataclass(frozen=True)
class Project:
    """A folder with a checkpoint, a slice, prose and the outputs of one sweep."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "outputs"

    @property
    def sweep(self) -> Path:
        return self.out / "sweeps" / "trivial"

    @property
    def lock(self) -> Path:
        return self.sweep / "sweep.lock.yaml"

    def copied(self, root: Path) -> Project:
        """The same elsewhere, with its outputs."""
        shutil.copytree(self.root, root)
        return Project(root)


def planned(root: Path, **changes: float) -> tuple[Project, Sequence[PlannedCell]]:
    """A project whose sweep is planned and not run."""
    (root / "data").mkdir(parents=True)
    shutil.copytree(trivial.FOLDER / "model", root / "models" / "mine")
    shutil.copy(trivial.FOLDER / "colours.jsonl", root / "data")
    shutil.copy(trivial.FOLDER / "prose.txt", root / "data")
    colours = Slice(str(root / "data/colours.jsonl"), "choice", False, None, 2)
    slices = Slices("own", Prose(str(root / "data/prose.txt"), None), {"colours": colours})
    drawn = Calibration("none", None, "none", None, "train", "text", 1, 1)
    grid = [
        replace(
            trivial.choice(bits, **changes),  # type: ignore[arg-type]
            model=Model("mine", str(root / "models/mine"), None, False, False),
            slices=slices,
            calibration=drawn,
        )
        for bits in BITS
    ]
    project = Project(root)
    return project, trivial.write(grid, project.out)[1]


def run(root: Path) -> Project:
    """The same, run to its end in this process."""
    project, _ = planned(root)
    assert launchers.launch(project.sweep, launchers.chosen(project.sweep), False) == 0
    return project
