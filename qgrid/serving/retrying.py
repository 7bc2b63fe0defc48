"""Another attempt where a request failed for a reason that may pass: a bounded number, with pauses.

The pauses double and are drawn at random ("full jitter",
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/, 2015), so that many
clients do not come back at once; a server that says when to come back (`Retry-After`) is obeyed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from qgrid.serving.failures import RequestFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Retries:
    """How often and how long to try again."""

    attempts: int = 4  # in all
    first_seconds: float = 0.5  # the longest first pause
    most_seconds: float = 20.0  # the longest pause of our own choosing
    within_seconds: float = 120.0  # of pauses in all; a server that asks for more is given up


async def retrying(
    attempt: Callable[[], Awaitable[T]],
    retries: Retries,
    failed: Callable[[RequestFailed], None] | None = None,
    rng: random.Random | None = None,
) -> T:
    """What `attempt()` gives; it is called again while it fails and may yet succeed.

    `failed` hears of every failure, also of the last.

    Raises:
        RequestFailed: of the last attempt.
    """
    drawn = random.Random() if rng is None else rng
    waited = 0.0
    for number in range(1, retries.attempts + 1):
        try:
            return await attempt()
        except RequestFailed as failure:
            if failed is not None:
                failed(failure)
            pause = _pause(failure, retries, number, drawn)
            last = number == retries.attempts
            if last or not failure.retryable or waited + pause > retries.within_seconds:
                raise
        begin = time.monotonic()
        await asyncio.sleep(pause)
        waited += time.monotonic() - begin
    raise ValueError(f"`attempts={retries.attempts}` should be 1 or more")


def _pause(failure: RequestFailed, retries: Retries, number: int, rng: random.Random) -> float:
    """Seconds before attempt `number + 1`."""
    longest = min(retries.most_seconds, retries.first_seconds * 2.0 ** (number - 1))
    own = rng.uniform(0.0, longest)
    return own if failure.retry_after is None else max(own, failure.retry_after)
