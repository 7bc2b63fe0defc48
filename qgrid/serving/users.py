"""How many users a model serves well: the knee of the curve, and the most that keep a promise."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qgrid.serving.summary import by_load, by_repeat, figures, kept, plain, promises_nothing

if TYPE_CHECKING:
    from qgrid.serving.samples import Sample
    from qgrid.types import Measurement, Slo

KEPT = 0.9  # of the requests of a load: one-sided, as a p90
FEWEST_LEVELS = 3  # of concurrency, for a curve to have a knee
FEWEST_TRIED = 2  # to say how many users keep a promise: one user alone is no trial


@dataclass(frozen=True)
class Level:
    """What a concurrency came to: output tokens a second, and the median request's seconds."""

    users: int
    throughput: float
    latency: float | None  # None: every request failed
    holds: bool | None  # the promise; None: nothing is promised

    @property
    def power(self) -> float:
        """Throughput over response time (Kleinrock, ICC 1979, paper 43.1; the knee is its peak)."""
        return 0.0 if self.latency is None else self.throughput / self.latency


def levels(samples: Sequence[Sample], slo: Slo) -> list[Level]:
    """The closed loops by their number of users; one where every request failed has no power."""
    found = []
    for load, own in by_load(samples).items():
        name, _, number = load.partition("=")
        repeats = by_repeat(own)
        if name == "concurrency":
            rates = [figures(each).output_throughput for each in repeats]
            times = [sample.latency for each in repeats for sample in each]
            found.append(
                Level(
                    int(number),
                    statistics.median(rates) if rates else 0.0,
                    statistics.median(times) if times else None,
                    None if promises_nothing(slo) else holds(own, slo),
                )
            )
    return sorted(found, key=lambda level: level.users)


def holds(samples: Sequence[Sample], slo: Slo) -> bool:
    """Whether 90 % of all requests keep each promise; one that failed keeps none."""
    good = [kept(each, slo) for each in samples if each.error is None]
    promises = {name for each in good for name in each}
    enough = KEPT * len(samples)
    return bool(good) and all(sum(each[name] for each in good) >= enough for name in promises)


def knee(found: Sequence[Level]) -> Level | None:
    """The level with the highest power; None for fewer than three levels."""
    if len(found) < FEWEST_LEVELS:
        return None
    return max(found, key=lambda level: level.power)


def most(found: Sequence[Level]) -> int | None:
    """The highest level up to which the promise holds; 0: not even for one user.

    None: nothing is promised, or only one level was measured. Levels above one that fails do not
    count, even where they hold by chance.
    """
    if len(found) < FEWEST_TRIED or found[0].holds is None:
        return None
    reached = 0
    for level in found:
        if not level.holds:
            break
        reached = level.users
    return reached


def measurements(found: Sequence[Level]) -> Iterator[Measurement]:
    """`knee_concurrency` and `max_users`, where they can be told."""
    bend, users = knee(found), most(found)
    if bend is not None:
        yield plain("knee_concurrency", bend.users, n=len(found))
    if users is not None:
        yield plain("max_users", users, n=len(found))


def at_least(found: Sequence[Level]) -> list[str]:
    """Which of the two is only a lower bound: the highest measured level was not too much."""
    if not found:
        return []
    top, bend = found[-1], knee(found)
    bounds = {
        "knee_concurrency": bend is not None and bend.users == top.users,
        "max_users": most(found) == top.users,
    }
    return [metric for metric, bound in bounds.items() if bound]
