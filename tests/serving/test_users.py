"""The knee and the most users, on curves made by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from qgrid.serving import users
from qgrid.serving.samples import Sample
from qgrid.serving.users import Level
from qgrid.types import Slo
from tests.serving.made import failed, sample


def curve(seconds: Mapping[int, float], requests: int = 10) -> list[Sample]:
    """`requests` of two tokens at each concurrency, sent at 0 and over after so long."""
    return [
        sample((t / 2, t), number=i, load=f"concurrency={n}")
        for n, t in seconds.items()
        for i in range(requests)
    ]


def measured(found: list[Level]) -> dict[str, float]:
    return {each.metric: each.value for each in users.measurements(found)}


def test_levels_are_throughput_and_the_median_latency() -> None:
    (level,) = users.levels([*curve({4: 2.0}), sample((1, 50), load="rate=2")], Slo())
    assert (level.users, level.throughput, level.latency) == (4, 10.0, 2.0)
    assert (level.power, level.holds) == (5.0, None)


def test_the_knee_is_the_highest_power() -> None:
    """A server with room for eight: to there time stays and throughput grows, then the reverse."""
    found = [
        Level(n, throughput=min(n, 8) * 10.0, latency=max(1.0, n / 8), holds=None)
        for n in (1, 2, 4, 8, 16, 32)
    ]
    assert users.knee(found) == found[3]
    assert measured(found) == {"knee_concurrency": 8}
    assert users.at_least(found) == []
    assert users.at_least(found[:4]) == ["knee_concurrency"]


def test_the_knee_of_a_queue() -> None:
    """M/M/1: at utilization u throughput is u and response time 1 / (1 - u); the peak is at 1/2."""
    found = [Level(round(100 * u), u, 1 / (1 - u), None) for u in (0.1, 0.3, 0.5, 0.7, 0.9)]
    knee = users.knee(found)
    assert knee is not None
    assert knee.users == 50


def test_two_levels_have_no_knee() -> None:
    assert measured(users.levels(curve({1: 1.0, 4: 1.5}), Slo())) == {}


def test_most_users_with_the_promise() -> None:
    samples = curve({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.5, 16: 1.0})
    found = users.levels(samples, Slo(e2e_latency_ms=1500))
    assert [level.holds for level in found] == [True, True, True, False, True]
    assert measured(found)["max_users"] == 4  # 16 held by chance
    assert users.at_least(found) == []


def test_a_promise_that_even_the_most_keep_is_a_lower_bound() -> None:
    found = users.levels(curve({1: 1.0, 2: 1.0}), Slo(e2e_latency_ms=1500))
    assert measured(found) == {"max_users": 2}
    assert users.at_least(found) == ["max_users"]


def test_one_user_alone_is_no_trial() -> None:
    found = users.levels(curve({1: 1.0}), Slo(e2e_latency_ms=1500))
    assert measured(found) == {}
    assert users.at_least(found) == []


def test_a_promise_that_nobody_gets() -> None:
    found = users.levels(curve({1: 1.0, 2: 1.0}), Slo(ttft_ms=1))
    assert measured(found) == {"max_users": 0}
    assert users.at_least(found) == []


@pytest.mark.parametrize(("slow", "holds"), [(1, True), (2, False)])
def test_nine_of_ten_must_keep_it(slow: int, holds: bool) -> None:
    samples = [*curve({1: 1.0}, 10 - slow), *curve({1: 9.0}, slow)]
    assert users.holds(samples, Slo(e2e_latency_ms=1000)) is holds


@pytest.mark.parametrize(("lost", "holds"), [(1, True), (2, False), (10, False)])
def test_a_failed_request_keeps_nothing(lost: int, holds: bool) -> None:
    samples = [*curve({1: 1.0}, 10 - lost), *[failed() for _ in range(lost)]]
    assert users.holds(samples, Slo(e2e_latency_ms=1000)) is holds


def test_each_promise_counts_by_itself() -> None:
    """One in ten is late with its first token, another with the last: p90 of both holds."""
    samples = [
        *(sample((0.1, 1.0)) for _ in range(8)),
        sample((0.9, 1.0)),
        sample((0.1, 5.0)),
    ]
    assert users.holds(samples, Slo(ttft_ms=200, e2e_latency_ms=2000))
    assert not users.holds([*samples, sample((0.9, 1.0))], Slo(ttft_ms=200))


def test_a_level_where_everything_failed_ends_it() -> None:
    samples = [*curve({1: 1.0, 2: 0.9}), failed(load="concurrency=4")]
    found = users.levels(samples, Slo(ttft_ms=2000))
    assert measured(found) == {"knee_concurrency": 2, "max_users": 2}
    assert found[-1].power == 0
