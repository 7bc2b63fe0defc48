"""A server's own figures: the text format, and looking at it beside a run."""

from __future__ import annotations

import asyncio
import time

from qgrid.serving import transport
from qgrid.serving.server_metrics import PERIOD_SECONDS, Gauges, Sampler, parsed
from tests.serving.stub import Clock, Stub

TWO_ENGINES = """\
# HELP one:num_requests_running Number of requests in model execution batches.
# TYPE one:num_requests_running gauge
one:num_requests_running{engine="0",model_name="/a b}c"} 3.0
one:num_requests_running{engine="1",model_name="x"} 4.0
one:num_requests_waiting{engine="0",model_name="x"} 2.0
one:num_requests_waiting{engine="1",model_name="x"} 5.0
one:num_requests_waiting_by_reason{engine="1",reason="capacity"} 99.0
one:kv_cache_usage_perc{engine="0"} 0.25
one:kv_cache_usage_perc{engine="1"} 0.5
one:prefix_cache_queries_total{engine="0"} 12.0
"""
PLAIN = """\
# TYPE two:kv_cache_usage_ratio gauge
two:kv_cache_usage_ratio 0.125
two:requests_processing 1
two:requests_deferred 6 1395066363000
two:n_busy_slots_per_decode NaN
"""


def test_the_figures_of_several_engines_are_one() -> None:
    assert parsed(TWO_ENGINES) == {"running": 7.0, "queue": 7.0, "kv_usage": 0.5}


def test_other_names_for_the_same() -> None:
    assert parsed(PLAIN) == {"kv_usage": 0.125, "running": 1.0, "queue": 6.0}


def test_a_server_that_tells_something_else_or_nothing() -> None:
    assert parsed("") == parsed("<html>no</html>") == parsed("up 1\n") == {}
    assert parsed("x:num_requests_waiting NaN\nx:num_requests_running what\n") == {}
    assert parsed("x:num_requests_waiting +Inf\n") == {}


def test_peaks_and_medians() -> None:
    gauges = Gauges({"rate=2": [{"queue": 1.0, "kv_usage": 0.2}, {"queue": 7.0}, {"queue": 3.0}]})
    found = {(m.metric, m.slice): (m.value, m.n) for m in gauges.measurements()}
    assert found == {("kv_usage_peak", "rate=2"): (0.2, 1), ("queue_peak", "rate=2"): (7.0, 3)}
    assert gauges.medians() == {"rate=2": {"kv_usage": 0.2, "queue": 3.0}}


def test_looking_at_a_real_server_at_a_bounded_rate() -> None:
    async def look() -> Gauges:
        async with transport.session(server.endpoint, 1) as session:
            sampler = Sampler(session, server.endpoint)
            for load in ("concurrency=1", "concurrency=2"):
                async with sampler.during(load):
                    await asyncio.sleep(1.3 * PERIOD_SECONDS)
            return sampler.gauges

    with Stub(Clock(), metrics=PLAIN) as server:
        begin = time.monotonic()
        gauges = asyncio.run(look())
        periods = (time.monotonic() - begin) / PERIOD_SECONDS
    assert set(gauges.seen) == {"concurrency=1", "concurrency=2"}
    assert 2 <= len(server.asked_for_metrics) <= 1 + periods  # not anew at every load


def test_a_server_without_figures_is_not_asked() -> None:
    async def look(endpoint_of: Stub) -> Gauges:
        async with transport.session(endpoint_of.endpoint, 1) as session:
            sampler = Sampler(session, endpoint_of.endpoint)
            async with sampler.during("concurrency=1"):
                await asyncio.sleep(0.3)
            return sampler.gauges

    with Stub(Clock()) as none, Stub(Clock(), metrics="up 1\n") as other:
        assert asyncio.run(look(none)).seen == {}
        assert none.asked_for_metrics == []
        assert asyncio.run(look(other)).seen == {}
        assert len(other.asked_for_metrics) == 1
