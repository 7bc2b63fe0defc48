"""Quantized copies of the random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import registry
from qgrid.types import Cell, Method

OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 128, "symmetric": True, "scheme": None},
    "nf4": {"double_quant": True},
    "int8": {"threshold": 6.0},
}


@pytest.fixture(scope="session")
def quantized(
    tiny_random: Path, make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[Path, Cell]]:
    """Quantize the random model once: `quantized("nf4", 4)` is a checkpoint and its cell."""
    made: dict[tuple[str, int], tuple[Path, Cell]] = {}

    def make(name: str, bits: int) -> tuple[Path, Cell]:
        if (name, bits) not in made:
            cell = make_cell(method=Method(name, OPTIONS[name]), bits=bits)
            out = tmp_path_factory.mktemp(f"{name}{bits}")
            registry.method(name).quantize(cell, tiny_random, out)
            made[name, bits] = out, cell
        return made[name, bits]

    return make
