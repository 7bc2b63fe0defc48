"""Every drill runs trivial cells, on locks of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills import trivial
from tests.drills.running import alone


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trivial.install(monkeypatch)
    alone(monkeypatch, tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An output folder that is not there yet."""
    return tmp_path / "outputs"


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """What the stages of a test note; it is not there before the first of them."""
    return tmp_path / "ledger.jsonl"
