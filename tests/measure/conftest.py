"""Small slices, prose and jobs about the random model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgrid.measure.encoding import Encoder
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Job, PlannedCell, Prose, Slice, Slices, Stage

WORDS = ("red", "green", "blue", "amber", "cold", "warm", "north", "bridge", "river", "paper")


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def lines(kind: str, documents: int = 0) -> Iterator[dict[str, Any]]:
    """Items of a slice: choices of several tokens, or a short text, or JSON."""
    rng = random.Random(kind)
    for number in range(12):
        item: dict[str, Any] = {"id": f"{kind}-{number}", "level": number % 3}
        item["prompt"] = sentence(rng, 3 + number % 5)
        if kind == "json":
            item |= {"answer": '{"a":1}', "schema": {"type": "object", "required": ["a"]}}
        elif kind == "exact":
            item["answer"] = sentence(rng, 1)
        else:
            choices = list(dict.fromkeys(sentence(rng, 1 + i % 3) for i in range(4)))
            item |= {"choices": choices, "answer": choices[number % len(choices)]}
        if documents:
            if number % (12 // documents) == 0:
                name = f"doc-{number // (12 // documents)}"
                yield {"document": name, "text": sentence(rng, 60)}
            item["document"] = name
        yield item


def write_slice(path: Path, kind: str, documents: int = 0) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(kind, documents)))
    return path


@pytest.fixture(scope="session")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Slices:
    """Four slices and some prose."""
    folder = tmp_path_factory.mktemp("slices")
    kinds = {"choice": "choice", "documents": "choice", "exact": "exact", "json": "json"}
    items = {
        name: Slice(
            str(write_slice(folder / f"{name}.jsonl", name, 3 if name == "documents" else 0)),
            scoring,  # type: ignore[arg-type]
            chat=True,
            limit=None,
            max_new_tokens=4,
        )
        for name, scoring in kinds.items()
    }
    prose = folder / "prose.txt"
    prose.write_text(sentence(random.Random("prose"), 900))
    return Slices("test", Prose(str(prose), 1000, "gptq"), items)


@pytest.fixture(scope="session")
def noisy(tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with every weight moved a little: a cell that differs from its baseline."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    shutil.copytree(tiny_random, folder)
    torch.manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    moved = {
        name: (tensor.float() * (1 + 0.05 * torch.randn(tensor.shape))).bfloat16()
        for name, tensor in weights.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def engine(tiny_random: Path, make_cell: Callable[..., Cell]) -> runtime.Transformers:
    return runtime.load(tiny_random, make_cell(), "float32")


@pytest.fixture(scope="session")
def encoder(tiny_random: Path) -> Encoder:
    return Encoder(tiny_random)


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """`make_job("quality", cell, artifact, baseline=None)`."""

    def make(stage: Stage, cell: Cell, artifact: Path, baseline: Path | None = None) -> Job:
        planned = PlannedCell("cell", "artifact", "quality", None, cell, added=False)
        out = tmp_path / f"{stage}-{artifact.parent.name}"
        out.mkdir(exist_ok=True)
        base = str(baseline) if baseline else None
        return Job(stage, planned, str(artifact), base, str(out), str(tmp_path))

    return make
