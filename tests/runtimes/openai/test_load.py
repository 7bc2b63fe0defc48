"""Loads on a server that fails in part, and servers that are killed in the middle."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qgrid.measure import speed
from qgrid.running import stages
from qgrid.runtimes import _openai_client as client
from qgrid.types import Workload
from tests.servers import cells, processes
from tests.servers.faulty import Faulty


def killed_when(server: processes.Served, ready: Callable[[], bool]) -> threading.Thread:
    def wait() -> None:
        until = time.monotonic() + 60
        while not ready() and time.monotonic() < until:
            time.sleep(0.01)
        server.kill()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def alone(tiny_random: Path, tmp_path: Path) -> Iterator[processes.Served]:
    """The server in a process of its own, 30 ms an answer."""
    port = processes.free_port()
    command = [sys.executable, "-m", "tests.servers.faulty", str(tiny_random), str(port), "0.03"]
    with processes.running(command, port, tmp_path / "server.log") as served:
        yield served


def test_a_kill_in_the_middle_of_quality_ends_the_stage(
    alone: processes.Served, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []
    read = client.Client.ask

    def counted(self: Any, bodies: Sequence[Any], use: Any) -> Any:
        def noted(answer: dict[str, Any], number: int) -> Any:
            answered.append(number)
            return use(answer, number)

        return read(self, bodies, noted)

    monkeypatch.setattr(client.Client, "ask", counted)
    thread = killed_when(alone, lambda: len(answered) >= 20)
    result = stages.run(job("quality", alone.base_url, retries=1))
    thread.join(20)
    assert len(answered) >= 20
    assert result.failure is not None
    assert result.failure.status == "crashed"
    assert "got no answer" in result.failure.message
    assert result.measurements == ()


def test_a_kill_in_the_middle_of_a_load_ends_the_stage(
    alone: processes.Served, job: Callable[..., Any]
) -> None:
    """The rest of the load fails at once; what was answered before stays in the samples."""
    workload = Workload("test", 8, 40, (4,), 2, 5, rounds=20, deadline_seconds=5.0)
    wanted = job("speed", alone.base_url, workload=workload)
    begin = time.monotonic()
    thread = killed_when(alone, lambda: time.monotonic() - begin > 4.0)
    result = stages.run(wanted)
    thread.join(20)
    counted = {m.slice: m.value for m in result.measurements if m.metric == "failed_requests"}
    assert result.failure is not None
    assert result.failure.status == "crashed"
    assert counted == {}
    samples = Path(wanted.out) / "samples.jsonl"
    if "samples.jsonl" in result.failure.message:  # it died after the warm-up
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert any(each.get("error") for each in lines)


def test_bad_requests_of_a_load_are_counted_and_kept_out(
    tiny_random: Path, job: Callable[..., Any]
) -> None:
    """One of each fault; all others are timed, and the stage ends."""
    faults = ["500", "429", "reset", "midway", "garbage", "stall", "length"]
    served: list[str] = []

    def in_turn(body: dict[str, Any], _: int) -> str | None:
        if not body.get("stream"):
            return None
        served.append("")
        place, left = divmod(len(served) - 31, 3)
        return faults[place] if left == 0 and 0 <= place < len(faults) else None

    workload = Workload("test", 8, 6, (4,), 2, 8, deadline_seconds=2.0)
    with Faulty(tiny_random, in_turn) as server:
        wanted = job("speed", server.base_url, workload=workload)
        result = speed.measure(wanted)
    lines = [
        json.loads(line) for line in (Path(wanted.out) / "samples.jsonl").read_text().splitlines()
    ]
    failed = [each for each in lines if each.get("error")]
    assert len(failed) == len(faults) - 1, [each["error"] for each in failed]
    assert result.observed["wrong_length"] == 1  # answered, but shorter than was asked for
    found = cells.values(result)
    counted = [value for (metric, _), value in found.items() if metric == "failed_requests"]
    assert sum(counted) == len(faults) - 1
    assert found["output_throughput", "concurrency=4"] > 0


def test_a_usage_that_comes_twice_is_one(tiny_random: Path, job: Callable[..., Any]) -> None:
    workload = Workload("test", 8, 6, (2,), 2, 5)

    def twice(body: dict[str, Any], _: int) -> str | None:
        return "usage" if body.get("stream") else None

    with Faulty(tiny_random, twice) as server:
        price = {"input": 1.0, "output": 2.0, "source": "list", "date": "2026-11-01"}
        result = speed.measure(job("speed", server.base_url, workload=workload, price=price))
    found = cells.values(result)
    assert found["failed_requests", "concurrency=2"] == 0
    assert found["usd_per_million_output_tokens", None] == pytest.approx(8 / 6 * 1.0 + 2.0)
    assert result.observed["price"]["source"] == "list"
