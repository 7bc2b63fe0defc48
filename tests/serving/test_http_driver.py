"""The driver against a real server with a known clock, or one that fails in a chosen way."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qgrid.contracts import InvalidEngine
from qgrid.serving import load, schedule, users
from qgrid.serving.http_driver import HttpDriver
from qgrid.serving.load import Timed
from qgrid.serving.samples import Sample
from qgrid.serving.schedule import Load, Run
from qgrid.serving.summary import summary
from qgrid.types import Slo, Workload
from tests.serving import stub as stubs
from tests.serving.stub import Behaviour, Clock, Stub, event, in_turn, sends, status, token

WORKLOAD = Workload("test", 8, 5, (3,), warmup=2, repeats=5, deadline_seconds=20.0)
CLOCK = Clock(prefill=0.03, step=0.02)
DONE = event(b"[DONE]")
WHOLE = (event(token()), event(token(finish="length")), event(stubs.usage(3, 2)), DONE)


def run_of(
    users: int | None = None,
    rate: float | None = None,
    prompts: int = 1,
    arrivals: tuple[float, ...] | None = None,
) -> Run:
    made = tuple((number, 7, 8) for number in range(prompts))
    return Run(Load(users, rate), 0, made, arrivals)


def samples_of(server: Stub, *runs: Run, workload: Workload = WORKLOAD) -> list[Sample]:
    with HttpDriver(server, workload) as driver:  # type: ignore[arg-type]
        return [sample for run in runs for sample in driver.run(run)]


def measured(server: Stub, workload: Workload = WORKLOAD) -> tuple[Timed, HttpDriver]:
    with HttpDriver(server, workload) as driver:  # type: ignore[arg-type]
        return load.timed(driver, workload, range(100), seed=0), driver


def test_times_are_those_of_the_clock() -> None:
    """The server's clock does not drift, so that no busy machine moves the median gap."""
    with Stub(CLOCK) as server:
        found = samples_of(server, *(run_of(users=2, prompts=2) for _ in range(5)))
    assert len(found) == 10
    gaps = [gap for each in found for gap in each.gaps]
    assert len(gaps) == 40
    assert statistics.median(gaps) == pytest.approx(0.02, rel=0.1)
    for each in found:
        assert each.sent >= 0
        assert each.ttft >= 0.03
        assert each.latency >= 0.03 + 4 * 0.02
        assert (each.prompt_tokens, each.output_tokens, each.counted) == (3, 5, True)


def test_what_a_request_asks_for() -> None:
    with Stub(CLOCK, extra={"ignore_eos": True, "min_tokens": 5}) as server:
        samples_of(server, run_of(users=1))
    assert server.bodies == [
        {
            "model": "stub",
            "prompt": [0, 7, 8],
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "min_tokens": 5,
        }
    ]


def test_a_closed_loop_has_so_many_requests_at_once_and_no_more() -> None:
    """Three users, four rounds: each sends its next request when the one before is over."""
    with Stub(CLOCK) as server:
        found = samples_of(server, run_of(users=3, prompts=12))
    assert server.most_active == 3
    assert sorted(body["prompt"][0] for body in server.bodies[:3]) == [0, 1, 2]
    assert sorted(body["prompt"][0] for body in server.bodies) == list(range(12))
    for user in range(3):
        own = found[user::3]
        for before, after in itertools.pairwise(own):
            assert after.sent >= before.arrivals[-1]


def test_an_open_loop_sends_when_it_is_time() -> None:
    moments = (0.0, 0.01, 0.02, 0.2)
    with Stub(CLOCK) as server:
        found = samples_of(server, run_of(rate=1.0, prompts=4, arrivals=moments))
    assert [each.scheduled for each in found] == pytest.approx(list(moments), abs=1e-6)
    assert server.most_active >= 3
    for each in found:
        assert each.scheduled is not None
        assert each.sent >= each.scheduled
        assert each.origin == each.scheduled


def test_waiting_in_a_server_that_stalls_is_not_hidden() -> None:
    """Coordinated omission: one request at a time, each takes 0.1 s, ten arrive within 0.05 s.

    The tenth waits for nine others. A client that waited with it would have called it quick.
    """
    clock = Clock(prefill=0.02, step=0.02)
    moments = tuple(0.005 * i for i in range(10))
    with Stub(stubs.one_at_a_time(clock)) as server:
        found = samples_of(server, run_of(rate=200.0, prompts=10, arrivals=moments))
        quick = samples_of(server, run_of(users=1, prompts=10))
    by_wait = sorted(found, key=lambda each: each.arrivals[-1])
    for place, each in enumerate(by_wait):
        assert each.latency >= (place + 1) * 0.1 - 0.005 * each.number
    steps = [each.tpot for each in found if each.tpot is not None]
    assert statistics.median(steps) == pytest.approx(0.02, rel=0.5)
    assert max(each.ttft for each in found) > 0.8
    assert statistics.median(each.ttft for each in quick) < 0.1


def test_a_client_that_is_late_counts_its_own_delay() -> None:
    """Requests that should have gone 0.3 s ago: latency begins then, and it is told."""
    late = run_of(rate=1.0, prompts=2, arrivals=(-0.3, -0.3))
    with Stub(CLOCK) as server, HttpDriver(server, WORKLOAD) as driver:  # type: ignore[arg-type]
        found = driver.run(late)
        assert driver.observed() == {"sent_late": 2}
    assert all(each.ttft >= 0.33 for each in found)


@pytest.mark.parametrize(
    ("behaviour", "counted", "arrivals", "output"),
    [
        (CLOCK, True, 5, 5),
        (replace(CLOCK, counts=False), False, 5, 5),
        (replace(CLOCK, counts=False, farewell=True), False, 5, 5),
        (replace(CLOCK, farewell=True), True, 5, 5),
        (sends(event(token("")), *WHOLE), True, 2, 2),
        (sends(event(token("")), event(token("")), *WHOLE[1:]), True, 2, 2),
        (sends(event(token("")), *WHOLE[1:2], event(stubs.usage(3, 10**400)), DONE), False, 2, 2),
        (replace(CLOCK, at_once=2), True, 3, 5),
        (replace(CLOCK, at_once=2, counts=False), False, 3, 3),
        (replace(CLOCK, tokens=3), True, 3, 3),
        (replace(CLOCK, done=False), True, 5, 5),
    ],
)
def test_tokens_are_counted_by_the_server_or_by_arrivals(
    behaviour: Behaviour, counted: bool, arrivals: int, output: int
) -> None:
    with Stub(behaviour) as server:
        (found,) = samples_of(server, run_of(users=1))
    assert found.error is None
    assert (found.counted, len(found.arrivals), found.output_tokens) == (counted, arrivals, output)


FAILING: Sequence[tuple[Behaviour, str]] = [
    (status(500, {"error": {"message": "no"}}), "status"),
    (status(429, {}, Retry_After="60"), "status"),
    (sends(event(token()), ends="cut"), "reset"),
    (sends(event(token())), "reset"),
    (sends(event(token()), b"garbage\n\n"), "garbage"),
    (
        sends(event(token()), event(b"{]"), event(token(finish="length")), event(b"[DONE]")),
        "garbage",
    ),
    (sends(event({"choices": []}), event(b"[DONE]")), "garbage"),
    (sends(event(token("", "stop")), event(b"[DONE]")), "garbage"),
    (sends(event(token()), event({"error": {"message": "no", "code": 500}})), "status"),
    (sends(event(token()), ends="stalls"), "timeout"),
    (stubs.mute(), "timeout"),
]


@pytest.mark.parametrize(("behaviour", "kind"), FAILING)
def test_a_failure_costs_its_own_request_only(behaviour: Behaviour, kind: str) -> None:
    """The second of three requests of one user: the others are timed as if nothing had been."""
    hasty = replace(WORKLOAD, deadline_seconds=3.0)
    with Stub(in_turn(CLOCK, behaviour, CLOCK)) as server:
        found = samples_of(server, run_of(users=1, prompts=3), workload=hasty)
    assert [each.kind for each in found] == [None, kind, None]
    assert found[1].error is not None
    assert server.endpoint.key not in found[1].error  # type: ignore[operator]
    assert [each.output_tokens for each in (found[0], found[2])] == [5, 5]


def test_counted_failures_of_a_whole_measuring() -> None:
    """Every fourth request is refused: a quarter fails at each load, and the rest is measured."""
    turns = itertools.count()

    async def every_fourth(server: Stub, *asked: Any) -> Any:
        bad = next(turns) % 4 == 3
        return await (status(503, {}) if bad else CLOCK)(server, *asked)

    workload = replace(WORKLOAD, rounds=4)
    with Stub(every_fourth) as server:
        timed, _ = measured(server, workload)
    found = {(m.metric, m.slice): m for m in summary(timed.samples)}
    assert found["failed_requests", "concurrency=1"].value == 5
    assert found["failed_requests", "concurrency=3"].value == 15
    assert found["failed_requests", "concurrency=3"].n == 60
    assert found["ttft_ms", "concurrency=1"].n == 15
    told = load.observed(timed, workload)
    assert told["failures"]["concurrency=3"]["status"]["requests"] == 15
    assert "HTTP 503" in told["failures"]["concurrency=1"]["status"]["first"]


def test_a_server_that_never_answers_well_ends_the_measuring() -> None:
    with (
        Stub(status(500, {"error": "no luck"})) as server,
        pytest.raises(load.NothingServed, match=r"batch 1 succeeded: .*HTTP 500: no luck"),
    ):
        measured(server)
    assert len(server.bodies) == 2 + 3  # batch 1 twice, the other load between


def test_a_server_that_dies_midway_is_given_up_and_what_came_before_counts() -> None:
    turns = itertools.count()

    async def dies(server: Stub, *asked: Any) -> Any:
        alive = next(turns) < 4 * 4  # two warm-ups and two repeats of 1 + 3 requests
        return await (CLOCK if alive else sends(ends="cut"))(server, *asked)

    with Stub(dies) as server:
        timed, _ = measured(server)
    assert timed.given_up == ["concurrency=1", "concurrency=3"]
    assert len(server.bodies) == 16 + 2 * 4 + 1  # the last asks whether it is gone for good
    assert timed.gone is not None
    assert timed.gone.startswith("no answer any more after 16 requests: ")
    found = {(m.metric, m.slice): m for m in summary(timed.samples)}
    assert found["failed_requests", "concurrency=3"].value == 6
    assert found["output_throughput", "concurrency=3"].n == 2


def test_a_load_that_never_works_is_told_and_not_served_to_anybody() -> None:
    """Given up in its warm-up: without a sample it would look as if nobody had tried it."""

    async def for_one(server: Stub, *asked: Any) -> Any:
        await asyncio.sleep(0.05)
        return await (status(503, {}) if server.most_active > 1 else CLOCK)(server, *asked)

    async def by_turns(server: Stub, *asked: Any) -> Any:
        server.most_active = server.active
        return await for_one(server, *asked)

    workload = replace(WORKLOAD, slo=Slo(ttft_ms=1e4))
    with Stub(by_turns) as server:
        timed, _ = measured(server, workload)
    assert timed.given_up == ["concurrency=3"]
    assert timed.gone is None
    found = {(m.metric, m.slice): m for m in summary(timed.samples)}
    failed = found["failed_requests", "concurrency=3"]
    assert (failed.value, failed.n) == (3, 3)
    levels = users.levels(timed.samples, workload.slo)
    assert users.most(levels) == 1
    assert not users.at_least(levels)


def test_a_dead_server_costs_no_deadline() -> None:
    begin = time.perf_counter()
    with Stub(CLOCK) as server:
        pass
    with pytest.raises(load.NothingServed, match="no connection"):
        measured(server)
    assert time.perf_counter() - begin < WORKLOAD.deadline_seconds


def test_lengths_are_promised_by_a_server_of_our_own_only() -> None:
    short = replace(CLOCK, tokens=4)
    message = "gave 4 tokens instead of 5"
    with Stub(short, own=True) as server, pytest.raises(InvalidEngine, match=message):
        measured(server)
    with Stub(replace(CLOCK, tokens=4)) as server:
        timed, _ = measured(server)
    told = load.observed(timed, WORKLOAD)
    assert (told["requests"], told["wrong_length"]) == (20, 20)


def test_what_differs_from_the_plain_case_is_told() -> None:
    turned = replace(CLOCK, at_once=2)
    with Stub(turned) as server:
        timed, _ = measured(server)
    told = load.observed(timed, WORKLOAD)
    told.pop("arrived_together", None)  # on a busy machine
    assert told == {"requests": 20, "several_tokens_a_chunk": 20}
    with Stub(replace(CLOCK, counts=False)) as server:
        timed, _ = measured(server)
    told = load.observed(timed, WORKLOAD)
    told.pop("arrived_together", None)
    assert told == {"requests": 20, "tokens_from_chunks": 20}


def test_chunks_that_lie_in_one_read_are_told() -> None:
    three = event(token()) + event(token()) + event(token(finish="length"))
    workload = replace(WORKLOAD, output_tokens=3)
    with Stub(sends(three, event(b"[DONE]"))) as server:
        timed, _ = measured(server, workload)
    assert load.observed(timed, workload)["arrived_together"] == 1.0


def test_a_server_that_refuses_to_count_is_asked_without() -> None:
    async def strict(server: Stub, request: Any, body: dict[str, Any]) -> Any:
        if "stream_options" in body:
            refused = status(400, {"error": {"message": "unknown field `stream_options`"}})
            return await refused(server, request, body)
        return await CLOCK(server, request, body)

    with Stub(strict) as server:
        timed, _ = measured(server)
    assert all(each.error is None and not each.counted for each in timed.samples)


def test_cached_prompts_are_told() -> None:
    counts = {"prompt_tokens_details": {"cached_tokens": 2}}
    events = (token(), token(finish="length"), stubs.usage(8, 2, **counts))
    workload = replace(WORKLOAD, output_tokens=2)
    with Stub(sends(*map(event, events), event(b"[DONE]"))) as server:
        timed, _ = measured(server, workload)
    assert load.observed(timed, workload)["cached_prompt_tokens"] == 2 * 20


def test_the_generator_tells_its_own_work_and_the_servers_figures() -> None:
    text = "x:num_requests_waiting 3\nx:kv_cache_usage_perc 0.5\n"
    with Stub(Clock(prefill=0.1, step=0.05), metrics=text) as server:
        _, driver = measured(server)
    found = {(m.metric, m.slice): m for m in driver.measurements()}
    for name in ("concurrency=1", "concurrency=3"):
        assert found["client_processors", name].value > 0
        assert found["queue_peak", name].value == 3
        assert found["kv_usage_peak", name].value == 0.5
    assert driver.observed()["server_medians"]["concurrency=1"] == {"queue": 3.0, "kv_usage": 0.5}


def test_every_load_of_a_workload_once_a_repeat() -> None:
    workload = replace(WORKLOAD, request_rates=(100.0,), rate_requests=4)
    with Stub(Clock(prefill=0.005, step=0.001)) as server:
        timed, _ = measured(server, workload)
    names = [each.name for each in schedule.loads(workload)]
    assert names == ["concurrency=1", "concurrency=3", "rate=100"]
    counts = {name: sum(each.load == name for each in timed.samples) for name in names}
    assert counts == {"concurrency=1": 5, "concurrency=3": 15, "rate=100": 20}
    assert [each.repeat for each in timed.samples] == sorted(each.repeat for each in timed.samples)
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 7 * (1 + 3 + 4)
