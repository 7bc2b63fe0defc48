"""From raw samples to measurements: one formula a metric, whoever made the tokens. Pure.

Definitions: docs/load.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qgrid import stats
from qgrid.metrics import METRICS
from qgrid.types import Measurement, Slo

if TYPE_CHECKING:
    from qgrid.serving.samples import Sample

_MS = 1000.0
_THROUGHPUTS = (
    "prefill_throughput",
    "decode_throughput",
    "output_throughput",
    "total_throughput",
    "request_throughput",
    "goodput",
)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """One repeat of one load: rates a second, of all requests that did not fail."""

    prefill_throughput: float
    decode_throughput: float | None  # None: somebody waited for a first token all the time
    output_throughput: float
    total_throughput: float
    request_throughput: float
    goodput: float | None  # None: nothing is promised


def figures(samples: Sequence[Sample], slo: Slo = Slo()) -> Figures:  # noqa: B008 - frozen
    """The rates of one repeat of one load, from samples without a failure."""
    last = max(each.arrivals[-1] for each in samples)
    seconds = last - min(each.sent for each in samples)
    prompts = sum(each.prompt_tokens for each in samples)
    output = sum(each.output_tokens for each in samples)
    waiting = union((each.sent, each.arrivals[0]) for each in samples)
    within = None if promises_nothing(slo) else sum(meets(each, slo) for each in samples)
    return Figures(
        prefill_throughput=prompts / length(waiting),
        decode_throughput=_decode_throughput(samples, waiting),
        output_throughput=output / seconds,
        total_throughput=(prompts + output) / seconds,
        request_throughput=len(samples) / seconds,
        goodput=None if within is None else within / seconds,
    )


def _decode_throughput(samples: Sequence[Sample], waiting: Sequence[Interval]) -> float | None:
    """Tokens that arrive while nobody waits for a first one, over the length of that time."""
    busy = union((each.sent, each.arrivals[-1]) for each in samples)
    seconds = length(without(busy, waiting))
    tokens = sum(
        each.output_tokens / len(each.arrivals) * _outside(each.arrivals, waiting)
        for each in samples
    )
    return tokens / seconds if seconds > 0 and tokens > 0 else None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that do not touch, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def without(whole: Sequence[Interval], part: Sequence[Interval]) -> list[Interval]:
    """The time of `whole` outside `part`; both as `union` gives them."""
    left = []
    for begin, end in whole:
        at = begin
        for cut_begin, cut_end in part:
            if cut_end <= at or cut_begin >= end:
                continue
            if cut_begin > at:
                left.append((at, cut_begin))
            at = cut_end
        if at < end:
            left.append((at, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    """Seconds of all intervals, which do not overlap."""
    return sum(end - begin for begin, end in intervals)


def _outside(moments: Sequence[float], intervals: Sequence[Interval]) -> int:
    """How many moments lie in none of the intervals, whose ends belong to them."""
    edges = np.array(intervals)
    index = np.searchsorted(edges[:, 0], np.array(moments), side="right") - 1
    inside = (index >= 0) & (np.array(moments) <= edges[np.maximum(index, 0), 1])
    return int(np.count_nonzero(~inside))


def promises_nothing(slo: Slo) -> bool:
    """Whether no latency is promised."""
    return slo == Slo()


def meets(sample: Sample, slo: Slo) -> bool:
    """Whether one request, which did not fail, stayed inside all that is promised."""
    return all(kept(sample, slo).values())


def kept(sample: Sample, slo: Slo) -> dict[str, bool]:
    """Each promise, and whether one request that did not fail kept it."""
    tpot = sample.tpot
    seconds = {
        "ttft_ms": (slo.ttft_ms, sample.ttft),
        "itl_ms": (slo.itl_ms, 0.0 if tpot is None else tpot),
        "e2e_latency_ms": (slo.e2e_latency_ms, sample.latency),
    }
    return {
        name: _MS * found <= promised
        for name, (promised, found) in seconds.items()
        if promised is not None
    }


def by_load(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each load, in the order in which the loads first come."""
    found: dict[str, list[Sample]] = {}
    for each in samples:
        found.setdefault(each.load, []).append(each)
    return found


def by_repeat(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples of one load that did not fail, repeat by repeat; repeats without any are left out."""
    found: dict[int, list[Sample]] = {}
    for each in samples:
        if each.error is None:
            found.setdefault(each.repeat, []).append(each)
    return list(found.values())


def summary(samples: Sequence[Sample], slo: Slo = Slo()) -> list[Measurement]:  # noqa: B008 - frozen
    """Every metric at every load, never mixed."""
    return [
        measurement
        for load, own in by_load(samples).items()
        for measurement in _at_load(load, own, slo)
    ]


def _at_load(load: str, samples: Sequence[Sample], slo: Slo) -> list[Measurement]:
    failed = sum(each.error is not None for each in samples)
    found = [plain("failed_requests", failed, load, len(samples))]
    repeats = by_repeat(samples)
    if not repeats:
        return found
    rates = [figures(each, slo) for each in repeats]
    for metric in _THROUGHPUTS:
        values = [value for each in rates if (value := getattr(each, metric)) is not None]
        if values:
            found.append(_median(metric, load, values))
    spread = _spread(load, rates)
    if spread is not None:
        found.append(plain("timing_cv", spread, load, len(rates)))
    good = [each for repeat in repeats for each in repeat]
    merged = sum(each.gaps[:1] == [0.0] for each in good)
    if merged:
        found.append(plain("merged_first_tokens", merged / len(good), load, len(good)))
    return [*found, *_latencies(load, repeats)]


def _spread(load: str, rates: Sequence[Figures]) -> float | None:
    """How far repeats differ; those of an open loop differ by their arrivals, which says nothing.

    By decoding, unless somebody is always waiting for a first token.
    """
    if not load.startswith("concurrency="):
        return None
    decode = [each.decode_throughput for each in rates if each.decode_throughput is not None]
    whole = len(decode) == len(rates)
    return variation(decode if whole else [each.output_throughput for each in rates])


def variation(values: Sequence[float]) -> float:
    """Coefficient of variation: sample standard deviation over mean."""
    middle = statistics.fmean(values)
    return statistics.stdev(values) / middle if len(values) > 1 and middle else 0.0


def _latencies(load: str, repeats: Sequence[Sequence[Sample]]) -> list[Measurement]:
    each_of: dict[str, Callable[[Sample], list[float]]] = {
        "ttft": lambda sample: [sample.ttft],
        "itl": lambda sample: sample.gaps,
        "tpot": lambda sample: [] if sample.tpot is None else [sample.tpot],
        "e2e_latency": lambda sample: [sample.latency],
    }
    found = []
    for metric, values in each_of.items():
        grouped = [[_MS * v for sample in repeat for v in values(sample)] for repeat in repeats]
        found += _latency(metric, load, [each for each in grouped if each])
    return found


def _latency(metric: str, load: str, repeats: Sequence[Sequence[float]]) -> list[Measurement]:
    """p50 with the interval of the repeats' medians, p90 and p99 of all values."""
    if not repeats:
        return []
    values = [value for each in repeats for value in each]
    low, high = stats.bootstrap_median([stats.percentile(each, 0.5) for each in repeats])
    middle = stats.percentile(values, 0.5)
    return [
        Measurement(f"{metric}_ms", middle, "ms", load, None, len(values), low, high),
        plain(f"{metric}_p90_ms", stats.percentile(values, 0.9), load, len(values)),
        plain(f"{metric}_p99_ms", stats.percentile(values, 0.99), load, len(values)),
    ]


def _median(metric: str, load: str, values: Sequence[float]) -> Measurement:
    low, high = stats.bootstrap_median(values)
    middle = statistics.median(values)
    return Measurement(metric, middle, METRICS[metric].unit, load, None, len(values), low, high)


def plain(metric: str, value: float, load: str | None = None, n: int | None = None) -> Measurement:
    """A number without an interval, in the metric's unit."""
    return Measurement(metric, float(value), METRICS[metric].unit, load, n=n)
