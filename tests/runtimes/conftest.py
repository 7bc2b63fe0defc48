"""Quantized copies of the random model, and sequences to score."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import registry
from qgrid.types import Cell, Method, Runtime
from tests.runtimes.passes import Ids, some_ids

OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 128, "symmetric": True, "scheme": None, "keep": None},
    "nf4": {"double_quant": True, "keep": None},
    "int8": {"threshold": 6.0, "keep": None},
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


@pytest.fixture(scope="module")
def sequences() -> list[Ids]:
    """Short ones of many lengths, three choices of one prompt, one longer than a chunk."""
    rng = random.Random(0)
    prompt = some_ids(rng, 40)
    short = [some_ids(rng, rng.randrange(2, 60)) for _ in range(20)]
    choices = [prompt + some_ids(rng, count) for count in (1, 3, 2)]
    return [*short, *choices, some_ids(rng, 1300), some_ids(rng, 7)]


LLAMA_CPP: dict[str, Any] = {
    "gpu_layers": None,
    "flash_attention": True,
    "batch": 2048,
    "ubatch": 512,
    "mmap": False,
    "kernel": "auto",
}


@pytest.fixture(scope="session")
def llama_cell(make_cell: Callable[..., Cell]) -> Callable[..., Cell]:
    """Build a cell of the llama.cpp runtime: `llama_cell({"batch": 64}, bits=4)`."""

    def make(options: dict[str, Any] | None = None, **changes: Any) -> Cell:
        own = Runtime("llama_cpp", "float32", "float32", 1, LLAMA_CPP | (options or {}))
        return make_cell(**({"runtime": own, "method": Method("gguf", {})} | changes))

    return make
