"""A small job about a server that misbehaves on purpose, and the engine of any server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qgrid import registry
from qgrid.methods import gguf
from qgrid.running import interpreters
from qgrid.runtimes import _openai_client as client
from qgrid.runtimes import openai
from qgrid.runtimes._openai_engine import Remote
from qgrid.serving import retrying
from qgrid.types import Cell, Method, Prose, Slice, Slices
from tests.servers import cells, real
from tests.servers.faulty import Faulty
from tests.servers.processes import Served

URL = "http://localhost:1/v1"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(attempts: int) -> retrying.Retries:
        return retrying.Retries(attempts=attempts, first_seconds=0.02)

    monkeypatch.setattr(client, "Retries", quick)


@pytest.fixture
def slices(tmp_path: Path) -> Slices:
    """A slice of choices, one of replies, and prose, all of the random model's words."""
    words = ["red", "green", "blue", "amber", "north", "bridge", "river", "seven"]

    def write(name: str, *, choices: bool) -> Slice:
        lines = []
        for number in range(12):
            prompt = " ".join(words[(number * k) % 8] for k in range(1, 6))
            item: dict[str, Any] = {"id": f"{name}-{number}", "prompt": f"{prompt} {number}"}
            answer = words[number % 8]
            item |= {"answer": answer}
            if choices:
                item |= {"choices": list(dict.fromkeys([answer, "stone", "red river", "paper"]))}
            lines.append(json.dumps(item) + "\n")
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(lines))
        return Slice(str(path), "choice" if choices else "exact", True, None, 4)

    text = tmp_path / "prose.txt"
    text.write_text(" ".join(words[(i * i) % 8] for i in range(500)))
    items = {"choice": write("choice", choices=True), "exact": write("exact", choices=False)}
    return Slices("faulty", Prose(str(text), 400), items)


@pytest.fixture
def remote(
    tiny_random: Path, make_cell: Callable[..., Cell], tmp_path: Path
) -> Iterator[Callable[..., Remote]]:
    """The engine of a server: `remote(server, retries=0)`."""
    opened: list[Remote] = []

    def load(server: Faulty, **more: Any) -> Remote:
        cell = cells.cell(make_cell, server.base_url, more)
        opened.append(openai.load(tiny_random, cell, "bfloat16"))
        return opened[-1]

    yield load
    for each in opened:
        each.close()


@pytest.fixture
def job(
    tiny_random: Path, make_cell: Callable[..., Cell], slices: Slices, tmp_path: Path
) -> Callable[..., Any]:
    """`job("quality", base_url, retries=0)`."""

    def make(stage: Any, base_url: str, out: str = "out", **more: Any) -> Any:
        changes = {"slices": slices, "context": 50}
        changes |= {"workload": more.pop("workload")} if "workload" in more else {}
        cell = cells.cell(make_cell, base_url, more, **changes)
        folder = cells.artifact(cell, tiny_random, tmp_path / "artifact")
        return cells.job(stage, cell, folder, tmp_path / out)

    return make


@pytest.fixture
def make(make_cell: Callable[..., Cell]) -> Callable[..., Cell]:
    return lambda base_url=URL, **more: cells.cell(make_cell, base_url, more)


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """vLLM's own OpenAI server."""
    try:
        interpreters.interpreter("vllm", "cpu")
    except interpreters.UnknownInterpreter as error:
        pytest.skip(str(error))
    with real.vllm(tmp_path_factory.mktemp("vllm")) as served:
        yield served


@pytest.fixture(scope="session")
def gguf_folder(make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a GGUF file of 16 bits."""
    out = tmp_path_factory.mktemp("gguf")
    cell = make_cell(model=real.TINY, method=Method("gguf", gguf.UNQUANTIZED))
    registry.method("gguf").quantize(cell, real.FOLDER, out)
    return out


@pytest.fixture(scope="session")
def llama(gguf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """llama.cpp's own server."""
    with real.llama(gguf_folder, tmp_path_factory.mktemp("llama")) as served:
        yield served
