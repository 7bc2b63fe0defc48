"""Engines in this process under the same loads: a sleeping one with a known clock, a real one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from qgrid import demo
from qgrid.contracts import Generation
from qgrid.measure._vocabulary import vocabulary
from qgrid.serving import load
from qgrid.serving.engine_driver import EngineDriver
from qgrid.serving.schedule import Load, Run
from qgrid.serving.summary import summary
from qgrid.types import Cell, Workload

WORKLOAD = Workload("test", 8, 4, (3,), warmup=2, repeats=5)
PREFILL, STEP = 0.12, 0.01


class Sleeper:
    """An engine that takes a known time for any batch."""

    def __init__(self, error: str | None = None) -> None:
        self.batches: list[int] = []
        self.error = error

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        begin, moments = time.perf_counter(), []
        self.batches.append(len(prompts))
        for i in range(max_new_tokens):
            time.sleep(STEP if i else PREFILL)
            moments.append(time.perf_counter() - begin)
        return [Generation((7,) * max_new_tokens, tuple(moments), self.error) for _ in prompts]


def run_of(load_: Load, prompts: int, arrivals: tuple[float, ...] | None = None) -> Run:
    return Run(load_, 0, tuple((i,) for i in range(prompts)), arrivals)


def test_a_closed_loop_is_waves() -> None:
    engine = Sleeper()
    found = EngineDriver(engine, WORKLOAD).run(run_of(Load(users=3), 9))  # type: ignore[arg-type]
    assert engine.batches == [3, 3, 3]
    assert [each.number for each in found] == list(range(9))
    for first, second in ((0, 3), (3, 6)):
        assert found[second].sent >= found[first].arrivals[-1]
    for each in found:
        assert each.ttft >= PREFILL
        assert each.latency >= PREFILL + 3 * STEP
        assert each.output_tokens == 4


def test_an_open_loop_takes_what_has_arrived() -> None:
    """One at 0; two more while it is computed go together, having waited; one comes later alone."""
    engine = Sleeper()
    moments = (0.0, 0.06, 0.08, 0.8)
    run = run_of(Load(rate=1.0), 4, moments)
    found = EngineDriver(engine, WORKLOAD).run(run)  # type: ignore[arg-type]
    assert engine.batches == [1, 2, 1]
    assert [each.scheduled for each in found] == list(moments)
    assert found[1].sent == found[2].sent >= found[0].arrivals[-1]
    assert found[1].ttft >= (0.15 - 0.06) + PREFILL  # its wait counts
    assert found[3].sent >= 0.8


def test_a_request_after_its_deadline_has_failed() -> None:
    hasty = replace(WORKLOAD, deadline_seconds=0.2)
    run = run_of(Load(rate=1.0), 2, (0.0, 0.06))
    found = EngineDriver(Sleeper(), hasty).run(run)  # type: ignore[arg-type]
    assert found[1].kind == "timeout"


def test_an_engine_that_says_why_there_is_nothing() -> None:
    engine = Sleeper(error="the server is gone")
    with pytest.raises(load.NothingServed, match="the server is gone"):
        load.timed(EngineDriver(engine, WORKLOAD), WORKLOAD, range(9), 0)  # type: ignore[arg-type]


def test_the_embedded_model_under_every_shape(make_cell: Callable[..., Cell]) -> None:
    """A real engine: raw samples are its own times, in the order of the requests."""
    from qgrid.runtimes import transformers as runtime

    workload = Workload("test", 16, 6, (2,), 2, 5, rounds=2, request_rates=(20.0,), rate_requests=3)
    engine = runtime.load(demo.MODEL_DIR, make_cell(), "bfloat16")
    waves: list[list[Generation]] = []
    generate = engine.generate

    def spied(
        prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        waves.append(generate(prompts, max_new_tokens, stop))
        return waves[-1]

    engine.generate = spied  # type: ignore[method-assign]
    timed = load.timed(EngineDriver(engine, workload), workload, vocabulary(demo.MODEL_DIR), 0)
    engine.close()
    found = {(m.metric, m.slice): m for m in summary(timed.samples)}
    assert {part for _, part in found} == {"concurrency=1", "concurrency=2", "rate=20"}
    assert found["ttft_ms", "concurrency=2"].n == 5 * 2 * 2
    assert found["ttft_ms", "rate=20"].n == 5 * 3
    assert found["failed_requests", "rate=20"].value == 0
    requests = [made for wave in waves for made in wave]
    assert len(requests) == 7 * (2 + 4 + 3)
    for sample, made in zip(timed.samples, requests[2 * (2 + 4 + 3) :], strict=True):
        since = [moment - sample.sent for moment in sample.arrivals]
        assert since == pytest.approx(made.seconds)
        assert sample.output_tokens == len(made.ids) == 6
