"""Checkpoints of every architecture that the converter knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.gguf import checkpoints


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every variant."""
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoints.byte_level(root, checkpoints.split_by(checkpoints.QWEN2))
    folders = {}
    for name, (architecture, changes) in checkpoints.VARIANTS.items():
        folders[name] = root / name.replace(" ", "-")
        folders[name].mkdir()
        for path in root.glob("*.json"):
            shutil.copy(path, folders[name])
        checkpoints.model(folders[name], architecture, **changes)
    return folders


@pytest.fixture
def checkpoint(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the first variant that a test may change."""
    folder = tmp_path / "source"
    shutil.copytree(made["llama"], folder)
    return folder
