"""What is sent when: loads, and for each of their repeats unique prompts and arrivals. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qgrid.types import Workload

MIN_WARMUP, MIN_REPEATS = 2, 5


@dataclass(frozen=True)
class Load:
    """A closed loop of so many users, or an open one of so many requests a second."""

    users: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """As measurements name it: `concurrency=8`, `rate=2`."""
        return f"rate={self.rate:g}" if self.users is None else f"concurrency={self.users}"


@dataclass(frozen=True)
class Run:
    """One repeat of one load.

    Closed: user `u` sends `prompts[u]`, `prompts[u + users]`, ... one after the other. Open:
    `prompts[i]` is sent `arrivals[i]` seconds after the beginning, whatever became of the others.
    """

    load: Load
    repeat: int  # below 0: warm-up
    prompts: tuple[tuple[int, ...], ...]
    arrivals: tuple[float, ...] | None  # None: closed


def loads(workload: Workload) -> list[Load]:
    """Every load once: batch 1 first, then the other closed loops, then the open ones."""
    users = dict.fromkeys((1, *workload.concurrency))
    rates = dict.fromkeys(workload.request_rates)
    return [*(Load(users=each) for each in users), *(Load(rate=each) for each in rates)]


def runs(workload: Workload, vocabulary: Sequence[int], seed: int) -> Iterator[list[Run]]:
    """Repeat by repeat, warm-up first, the runs of all loads: they take turns.

    No prompt comes twice, so that a cache of prefixes stays cold. The arrivals of a load differ
    from repeat to repeat; the interval over repeats covers that too.
    """
    rng = random.Random(f"{seed}:{workload.prompt_tokens}")
    warmup = max(workload.warmup, MIN_WARMUP)
    for repeat in range(-warmup, max(workload.repeats, MIN_REPEATS)):
        yield [_run(each, repeat, workload, vocabulary, rng) for each in loads(workload)]


def _run(
    load: Load, repeat: int, workload: Workload, vocabulary: Sequence[int], rng: random.Random
) -> Run:
    open_loop = load.rate is not None
    count = workload.rate_requests if open_loop else (load.users or 0) * workload.rounds
    made = tuple(tuple(rng.choices(vocabulary, k=workload.prompt_tokens)) for _ in range(count))
    moments = None if load.rate is None else poisson(load.rate, count, rng)
    return Run(load, repeat, made, moments)


def poisson(rate: float, count: int, rng: random.Random) -> tuple[float, ...]:
    """Moments of `count` arrivals, the first at 0, with exponential gaps of mean `1 / rate` s."""
    moments = [0.0]
    while len(moments) < count:
        moments.append(moments[-1] + rng.expovariate(rate))
    return tuple(moments[:count])
