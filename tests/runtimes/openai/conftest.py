"""A small job about a server that misbehaves on purpose, and the engine of any server."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qgrid import stages
from qgrid.contracts import InvalidEngine, NoLogprobs, Unsupported
from qgrid.measure import quality, speed
from qgrid.measure.encoding import Encoder
from qgrid.runtimes import _openai_client as client
from qgrid.runtimes import openai
from qgrid.runtimes._openai_client import ServerLost
from qgrid.runtimes._openai_engine import Remote
from qgrid.runtimes._openai_probe import PROBE
from qgrid.serving import retrying
from qgrid.types import Cell, Prose, Slice, Slices, StageResult, Workload
from tests.servers import cells, processes
from tests.servers.faulty import Faulty, distribution, greedy, logprobs

KEY = "sk-test-0123456789abcdef0123"
IDS = [300, 301, 302, 303, 304, 305]
TRANSIENT = ["500", "429", "reset", "midway", "garbage", "error200", "short", "others", "null"]
EVERYTHING = frozenset({"ids", "echo", "tokenize", "models", "extensions"})


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
