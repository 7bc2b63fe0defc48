"""What is sent when: counts, orders, unique prompts, and arrivals that are a Poisson process."""

from __future__ import annotations

import itertools
import random
import statistics
from typing import Any

import pytest

from qgrid.serving import schedule
from qgrid.serving.schedule import Load, Run, poisson
from qgrid.types import Workload

VOCABULARY = [2, 3, 5, 7, *range(100, 400)]


def workload(**changes: Any) -> Workload:
    fields: dict[str, Any] = {
        "name": "test",
        "prompt_tokens": 16,
        "output_tokens": 6,
        "concurrency": (4,),
        "warmup": 2,
        "repeats": 5,
    }
    return Workload(**(fields | changes))


def drawn(seed: int = 0, **changes: Any) -> list[list[Run]]:
    return list(schedule.runs(workload(**changes), VOCABULARY, seed))


def test_loads_take_turns_after_a_warm_up() -> None:
    found = drawn(concurrency=(4, 1, 4), request_rates=(0.5, 2.0))
    assert [repeat[0].repeat for repeat in found] == [-2, -1, 0, 1, 2, 3, 4]
    names = ["concurrency=1", "concurrency=4", "rate=0.5", "rate=2"]
    assert [[run.load.name for run in repeat] for repeat in found] == [names] * 7


def test_fewer_repeats_than_the_protocol_are_raised() -> None:
    assert [repeat[0].repeat for repeat in drawn(warmup=0, repeats=1)] == list(range(-2, 5))
    assert [repeat[0].repeat for repeat in drawn(warmup=3, repeats=6)] == list(range(-3, 6))


def test_requests_of_a_run() -> None:
    one, four, open_loop = drawn(rounds=3, request_rates=(2.0,), rate_requests=9)[0]
    assert [len(run.prompts) for run in (one, four, open_loop)] == [3, 12, 9]
    assert one.arrivals is None
    assert four.arrivals is None
    assert open_loop.arrivals is not None
    assert len(open_loop.arrivals) == 9


def test_prompts_are_unique_of_one_length_and_of_the_vocabulary() -> None:
    runs = [run for repeat in drawn(rounds=2, request_rates=(2.0,)) for run in repeat]
    prompts = [prompt for run in runs for prompt in run.prompts]
    assert len(set(prompts)) == len(prompts) == 7 * (2 + 8 + 32)
    assert {len(prompt) for prompt in prompts} == {16}
    assert set().union(*prompts) == set(VOCABULARY)


def test_the_seed_decides() -> None:
    rated = {"request_rates": (2.0,)}
    assert drawn(1, **rated) == drawn(1, **rated)
    assert drawn(1, **rated) != drawn(2, **rated)
    moments = [repeat[-1].arrivals for repeat in drawn(1, **rated)]
    assert len(set(moments)) == 7  # every repeat has its own


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_gaps_between_arrivals_are_exponential(rate: float) -> None:
    """Mean, deviation, the share above the mean (1/e), and no memory from gap to gap."""
    moments = poisson(rate, 20_001, random.Random(3))
    gaps = [rate * (b - a) for a, b in itertools.pairwise(moments)]
    assert moments[0] == 0
    assert min(gaps) > 0
    assert statistics.fmean(gaps) == pytest.approx(1, abs=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1, abs=0.05)
    assert sum(gap > 1 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.015)
    assert statistics.correlation(gaps[1:], gaps[:-1]) == pytest.approx(0, abs=0.03)
    counts = [0] * (int(rate * moments[-1]) + 1)
    for moment in moments:
        counts[int(rate * moment)] += 1
    assert statistics.variance(counts) / statistics.fmean(counts) == pytest.approx(1, abs=0.05)


def test_names_of_loads() -> None:
    assert Load(users=8).name == "concurrency=8"
    assert [Load(rate=rate).name for rate in (2.0, 0.25, 12.5)] == [
        "rate=2",
        "rate=0.25",
        "rate=12.5",
    ]
