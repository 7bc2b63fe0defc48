"""Formulas on samples made by hand; expected values are worked out in the test."""

from __future__ import annotations

import json
import random
import statistics
from typing import Any

import pytest

from qgrid import timing
from qgrid.contracts import Generation
from qgrid.serving import summary as module
from qgrid.serving.samples import Sample
from qgrid.serving.summary import figures, kept, meets, summary
from qgrid.types import Measurement, Slo
from tests.serving.made import failed, sample


def found_of(
    samples: list[Sample], slo: Slo | None = None
) -> dict[tuple[str, str | None], Measurement]:
    return {(m.metric, m.slice): m for m in summary(samples, Slo() if slo is None else slo)}


def test_requests_that_overlap() -> None:
    """A: sent 0, tokens 1 2 3 4. B: sent 2.5, tokens 3.5 4.5 5.5.

    Somebody waits in [0, 1] and [2.5, 3.5]: 2 s for 20 prompt tokens. The rest of [0, 5.5] is
    3.5 s; in it arrive A's 2 and 4 and B's 4.5 and 5.5, not A's 3.
    """
    found = figures([sample((1, 2, 3, 4)), sample((3.5, 4.5, 5.5), sent=2.5)])
    assert found.prefill_throughput == pytest.approx(20 / 2)
    assert found.decode_throughput == pytest.approx(4 / 3.5)
    assert found.output_throughput == pytest.approx(7 / 5.5)
    assert found.total_throughput == pytest.approx(27 / 5.5)
    assert found.request_throughput == pytest.approx(2 / 5.5)
    assert found.goodput is None


def test_time_in_which_nobody_is_served_counts_for_neither_phase() -> None:
    """An open loop at rest from 3 to 7: it lowers what is put out, not how fast tokens come."""
    found = figures([sample((1, 2, 3)), sample((8, 9, 10), sent=7, scheduled=7)])
    assert found.prefill_throughput == pytest.approx(20 / 2)
    assert found.decode_throughput == pytest.approx(4 / 4)
    assert found.output_throughput == pytest.approx(6 / 10)


def test_no_decoding_rate_where_somebody_always_waits() -> None:
    always = [sample((2, 3, 4)), sample((4, 4.5), sent=1), sample((5,), sent=4)]
    assert figures(always).decode_throughput is None
    assert ("decode_throughput", "concurrency=1") not in found_of(always)
    assert ("output_throughput", "concurrency=1") in found_of(always)


def test_an_arrival_of_several_tokens() -> None:
    """Nine tokens in three arrivals: three each; one gap is one gap."""
    one = sample((1, 2, 3), output_tokens=9)
    assert figures([one]).decode_throughput == pytest.approx(6 / 2)
    assert figures([one]).output_throughput == pytest.approx(9 / 3)
    assert one.gaps == [1, 1]
    assert one.tpot == pytest.approx(2 / 8)


def as_before(made: list[Generation], prompt_tokens: int) -> tuple[float, float]:
    """Prefill and decode rate of a batch as qgrid defined them for requests that start together."""
    begin = max(each.seconds[0] for each in made)
    decoded = sum(moment > begin for each in made for moment in each.seconds)
    lasts = max(each.seconds[-1] for each in made)
    return len(made) * prompt_tokens / begin, decoded / (lasts - begin)


@pytest.mark.parametrize("seed", range(20))
def test_a_wave_has_the_rates_it_always_had(seed: int) -> None:
    """Requests that start together, their first tokens at different times, some of them at once."""
    rng = random.Random(seed)
    steps = [0.1 * (i + 1) for i in range(30)]
    made = []
    for _ in range(rng.randrange(1, 9)):
        first = rng.randrange(8)
        made.append(Generation((1,) * 12, tuple(steps[first : first + 12])))
    found = figures([sample(each.seconds) for each in made])
    prefill, decode = as_before(made, 10)
    assert found.prefill_throughput == pytest.approx(prefill)
    assert found.decode_throughput == pytest.approx(decode)


def test_rates_against_counting_in_small_steps() -> None:
    """The same rates by walking along a fine grid of time instead of by intervals."""
    rng = random.Random(5)
    samples = []
    for number in range(12):
        sent = rng.uniform(0, 6)
        first = sent + rng.uniform(0.05, 0.4)
        gaps = [rng.uniform(0.01, 0.3) for _ in range(9)]
        arrivals = [first + sum(gaps[:i]) for i in range(10)]
        samples.append(sample(arrivals, sent=sent, number=number))
    step, waited, decoding = 0.0005, 0.0, 0.0
    for i in range(int(12 / step)):
        now = (i + 0.5) * step
        waits = any(s.sent <= now <= s.arrivals[0] for s in samples)
        busy = any(s.sent <= now <= s.arrivals[-1] for s in samples)
        waited += step * waits
        decoding += step * (busy and not waits)
    tokens = sum(
        not any(s.sent <= moment <= s.arrivals[0] for s in samples)
        for each in samples
        for moment in each.arrivals
    )
    assert 10 < tokens < 100
    assert decoding > 0.5
    found = figures(samples)
    assert found.prefill_throughput == pytest.approx(120 / waited, rel=0.01)
    assert found.decode_throughput == pytest.approx(tokens / decoding, rel=0.01)


def test_latency_counts_from_the_moment_that_was_planned() -> None:
    late = sample((3, 4), sent=2.5, scheduled=1.0)
    assert (late.ttft, late.latency, late.tpot) == (2, 3, 1)
    punctual = sample((3, 4), sent=2.5)
    assert (punctual.ttft, punctual.latency) == (0.5, 1.5)


def test_latencies_at_each_load() -> None:
    """Three repeats: p50 with the interval of the repeats' medians, p90 and p99 of all."""
    samples = [
        sample((first, first + 0.2, first + 0.5), repeat=repeat, number=i, load=f"concurrency={c}")
        for c in (1, 2)
        for repeat in range(3)
        for i, first in enumerate((0.1 * c * (repeat + 1), 0.2 * c * (repeat + 1)))
    ]
    found = found_of(samples)
    ttft = sorted([100, 200, 200, 400, 300, 600])
    middle = found["ttft_ms", "concurrency=1"]
    assert middle.value == pytest.approx(statistics.median(ttft))
    assert [middle.low, middle.high, middle.n] == pytest.approx([150, 450, 6])
    assert found["ttft_p90_ms", "concurrency=1"].value == pytest.approx(500)  # 0.9 * 5 = 4.5
    assert found["ttft_p99_ms", "concurrency=1"].value == pytest.approx(590)
    assert found["ttft_ms", "concurrency=2"].value == pytest.approx(2 * middle.value)
    assert found["tpot_ms", "concurrency=1"].value == pytest.approx(250)
    assert found["itl_p99_ms", "concurrency=1"].value == pytest.approx(300)
    assert found["itl_ms", "concurrency=1"].n == 12
    assert found["e2e_latency_ms", "concurrency=1"].value == pytest.approx(middle.value + 500)
    output = [6 / (s + 0.5) for s in (0.2, 0.4, 0.6)]
    assert found["output_throughput", "concurrency=1"].value == pytest.approx(
        statistics.median(output)
    )
    assert found["output_throughput", "concurrency=1"].low == pytest.approx(min(output))


def test_failed_requests_are_counted_and_kept_out() -> None:
    """Of every figure: the same as if they had never been sent."""
    good = [sample((0.1, 0.2 + 0.01 * r), repeat=r) for r in range(5)]
    bad = [failed(repeat=r, number=1) for r in range(3)]
    found, plain = found_of([*good, *bad]), found_of(good)
    assert found.pop(("failed_requests", "concurrency=1")).value == 3
    assert plain.pop(("failed_requests", "concurrency=1")).value == 0
    assert found == plain


def test_a_load_without_one_answer_has_nothing_but_its_failures() -> None:
    found = summary([failed(load="rate=2"), sample((1, 2))])
    assert [m for m in found if m.slice == "rate=2"] == [
        Measurement("failed_requests", 1.0, "requests", "rate=2", n=1)
    ]


def test_first_tokens_that_were_read_with_the_second() -> None:
    """Told of the requests that did not fail, and only where there are any."""
    good, late = sample((0.1, 0.2, 0.3)), sample((0.3, 0.3, 0.4))
    assert ("merged_first_tokens", "concurrency=1") not in found_of([good])
    few = found_of([good, late, good, good])["merged_first_tokens", "concurrency=1"]
    assert (few.value, few.n) == (0.25, 4)  # the median stays what it is
    assert not timing.is_unstable(few)
    many = found_of([good, late, late, good])["merged_first_tokens", "concurrency=1"]
    assert timing.is_unstable(many)


def test_repeats_that_differ() -> None:
    """Of a closed loop by decoding; an open loop differs by its arrivals, which says nothing."""
    samples = [sample((0.1, 0.1 + t), repeat=i) for i, t in enumerate((0.1, 0.2, 0.3))]
    rates = [1 / 0.1, 1 / 0.2, 1 / 0.3]
    expected = statistics.stdev(rates) / statistics.fmean(rates)
    assert found_of(samples)["timing_cv", "concurrency=1"].value == pytest.approx(expected)
    rated = [sample(s.arrivals, load="rate=2", repeat=s.repeat) for s in samples]
    assert ("timing_cv", "rate=2") not in found_of(rated)
    single = [sample((t,), repeat=i) for i, t in enumerate((0.1, 0.2))]
    assert found_of(single)["timing_cv", "concurrency=1"].value == pytest.approx(
        statistics.stdev([10, 5]) / 7.5
    )


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=100), True),
        (Slo(ttft_ms=99), False),
        (Slo(itl_ms=200), True),
        (Slo(itl_ms=199), False),
        (Slo(e2e_latency_ms=500), True),
        (Slo(e2e_latency_ms=499), False),
        (Slo(100, 200, 500), True),
        (Slo(100, 200, 499), False),
    ],
)
def test_promises(slo: Slo, good: bool) -> None:
    """TTFT 100 ms, two gaps of 100 and 300 (mean 200), latency 500: `itl` is of the mean."""
    one = sample((0.125, 0.225, 0.525), sent=0.025)
    assert meets(one, slo) is good


def test_a_promise_of_latency_counts_from_the_planned_moment() -> None:
    late = sample((0.5, 0.6), sent=0.4, scheduled=0.0)
    assert kept(late, Slo(ttft_ms=200, itl_ms=150)) == {"ttft_ms": False, "itl_ms": True}


def test_goodput() -> None:
    """Two of four inside, over 2 s; the failed one is not inside."""
    samples = [
        sample((0.1, 2.0)),
        sample((0.2, 1.0)),
        sample((0.3, 1.0)),
        sample((0.4, 1.0)),
        failed(),
    ]
    found = found_of(samples, Slo(ttft_ms=250))
    assert found["goodput", "concurrency=1"].value == pytest.approx(2 / 2.0)
    assert found["goodput", "concurrency=1"].unit == "req/s"
    assert ("goodput", "concurrency=1") not in found_of(samples)


def test_intervals_of_time() -> None:
    union = module.union([(3, 4), (0, 1), (1, 2), (3.5, 5), (3.6, 3.7)])
    assert union == [(0, 2), (3, 5)]
    assert module.without(union, [(0.5, 1), (1.5, 4)]) == [(0, 0.5), (1, 1.5), (4, 5)]
    assert module.without(union, [(0, 5)]) == []
    assert module.without(union, []) == union


def test_a_line_of_the_file_holds_everything() -> None:
    plain: dict[str, Any] = dict(sample((1.23456789,), scheduled=0.1234567).plain())
    assert json.loads(json.dumps(plain)) == {
        "load": "concurrency=1",
        "repeat": 0,
        "number": 0,
        "scheduled": 0.123457,
        "sent": 0.0,
        "arrivals": [1.234568],
        "prompt_tokens": 10,
        "output_tokens": 1,
        "counted": True,
        "cached_tokens": 0,
        "kind": None,
        "error": None,
    }
