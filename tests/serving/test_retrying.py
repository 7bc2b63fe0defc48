"""Attempts are bounded in number and in time, and only what may pass is tried again."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from qgrid.serving import retrying as module
from qgrid.serving.failures import RequestFailed
from qgrid.serving.retrying import Retries, retrying

QUICK = Retries(attempts=4, first_seconds=0.01, most_seconds=0.02, within_seconds=5.0)


class Flaky:
    """Fails so often, then answers."""

    def __init__(self, *failures: RequestFailed) -> None:
        self.left = list(failures)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.left:
            raise self.left.pop(0)
        return "answer"


def failed(status: int = 503, retryable: bool = True, after: float | None = None) -> RequestFailed:
    return RequestFailed("status", "x", status=status, retryable=retryable, retry_after=after)


def test_what_passes_is_tried_again_and_every_failure_is_heard_of() -> None:
    attempt, heard = Flaky(failed(500), failed(429)), list[int | None]()
    found = asyncio.run(retrying(attempt, QUICK, lambda failure: heard.append(failure.status)))
    assert (found, attempt.calls, heard) == ("answer", 3, [500, 429])


def test_what_will_not_pass_is_not_tried_again() -> None:
    attempt = Flaky(failed(404, retryable=False))
    with pytest.raises(RequestFailed):
        asyncio.run(retrying(attempt, QUICK))
    assert attempt.calls == 1


def test_attempts_are_bounded() -> None:
    attempt = Flaky(*(failed(500 + i) for i in range(10)))
    with pytest.raises(RequestFailed) as raised:
        asyncio.run(retrying(attempt, QUICK))
    assert attempt.calls == 4
    assert raised.value.status == 503  # the last, not the first


def test_the_server_says_when_to_come_back() -> None:
    begin = time.monotonic()
    asyncio.run(retrying(Flaky(failed(429, after=0.3)), QUICK))
    assert time.monotonic() - begin >= 0.3


def test_a_server_that_asks_for_too_long_is_given_up_at_once() -> None:
    attempt = Flaky(failed(429, after=3600))
    begin = time.monotonic()
    with pytest.raises(RequestFailed):
        asyncio.run(retrying(attempt, QUICK))
    assert attempt.calls == 1
    assert time.monotonic() - begin < 5


def test_pauses_double_up_to_a_limit() -> None:
    retries = Retries(first_seconds=1.0, most_seconds=5.0)
    rng = random.Random(0)
    for number, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (9, 5.0)):
        drawn = [module._pause(failed(), retries, number, rng) for _ in range(500)]
        assert 0 <= min(drawn) < 0.1 * longest
        assert 0.9 * longest < max(drawn) <= longest
