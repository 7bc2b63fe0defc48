"""Statistics against brute force, defining equations and worked examples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from qgrid import stats


def test_percentile_interpolates_at_f_times_n_minus_1() -> None:
    assert stats.percentile([10.0, 20.0, 30.0, 40.0], 0.5) == 25.0
    assert stats.percentile([10.0, 20.0, 30.0, 40.0], 0.9) == pytest.approx(37.0)
    assert stats.percentile(range(11), 0.95) == 9.5
    with pytest.raises(ValueError, match="at least one"):
        stats.percentile([], 0.5)


def test_stderr_without_clusters_is_the_familiar_one() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert stats.clustered_stderr(values) == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert stats.clustered_stderr([1.0]) is None


def test_stderr_of_repeated_values_does_not_shrink_with_clusters() -> None:
    values = np.random.default_rng(1).normal(size=40)
    labels = [i for i in range(40) for _ in range(10)]
    repeated = stats.clustered_stderr(np.repeat(values, 10), labels)
    assert repeated == pytest.approx(stats.clustered_stderr(values))


def test_wilson_bounds_solve_their_equation() -> None:
    """The bounds are the proportions that lie 1.96 of their own standard errors away."""
    for k, n in itertools.product(range(0, 21, 4), (20, 37)):
        for bound in stats.wilson(k, n):
            distance = abs(k / n - bound)
            error = math.sqrt(bound * (1 - bound) / n)
            assert distance == pytest.approx(stats.normal_quantile() * error, abs=1e-9)
    assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    with pytest.raises(ValueError, match="5 successes of 4"):
        stats.wilson(5, 4)


def test_mcnemar_equals_counting_every_outcome() -> None:
    for worse, better in itertools.product(range(6), range(6)):
        flips = worse + better
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=flips)]
        one = sum(heads >= worse for heads in outcomes) / len(outcomes)
        far = abs(worse - flips / 2)
        two = sum(abs(heads - flips / 2) >= far for heads in outcomes) / len(outcomes)
        assert stats.mcnemar(worse, better) == pytest.approx(one)
        assert stats.mcnemar_two_sided(worse, better) == pytest.approx(two)


def test_a_net_loss_cannot_be_judged_without_its_flips() -> None:
    """HumanEval, 164 items: 92 right, then 85; the same loss of 7 from different flips."""
    assert stats.mcnemar(7, 0) == pytest.approx(0.008, abs=5e-4)
    assert stats.mcnemar(12, 5) == pytest.approx(0.072, abs=5e-4)
    for discordant in range(16, 39):
        worse = (discordant + 16) // 2
        assert stats.mcnemar(worse, worse - 16) <= 0.0075


def test_300_items_cannot_show_less_than_a_point() -> None:
    """Even 3 flips each way leave an interval that reaches past one point."""
    low, high = stats.newcombe_paired(both=200, only_first=3, only_second=3, neither=94)
    assert low < -0.01
    assert high > 0.01


def test_newcombe_gives_known_intervals() -> None:
    known = {
        (36, 12, 2, 0): (0.0569, 0.3404),
        (18, 12, 2, 18): (0.0562, 0.3290),
        (0, 30, 0, 0): (0.8395, 1.0000),
    }
    for cells, expected in known.items():
        assert stats.newcombe_paired(*cells) == pytest.approx(expected, abs=5e-5), cells


def test_newcombe_covers_the_truth() -> None:
    rng = np.random.default_rng(6)
    shares = (0.6, 0.05, 0.15, 0.2)
    tables = rng.multinomial(120, shares, size=400).tolist()
    inside = [low <= -0.1 <= high for low, high in (stats.newcombe_paired(*t) for t in tables)]
    assert 0.92 <= np.mean(inside) <= 0.98


def test_newcombe_turns_with_the_sign() -> None:
    low, high = stats.newcombe_paired(50, 9, 4, 20)
    assert stats.newcombe_paired(50, 4, 9, 20) == pytest.approx((-high, -low))


def interval(*values: Any, **options: Any) -> tuple[float, float]:
    found = stats.bootstrap_mean(*values, **options)
    assert found is not None
    return found


def test_one_cluster_has_no_interval() -> None:
    assert stats.bootstrap_mean([1.0, 0.0, 1.0], ["a"] * 3) is None
    assert stats.bootstrap_mean([1.0]) is None


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, size=400)
    low, high = interval(values)
    estimate = stats.mean(values)
    assert estimate.low is not None and estimate.high is not None
    assert (low, high) == pytest.approx((estimate.low, estimate.high), abs=0.01)


def test_bootstrap_draws_whole_clusters() -> None:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=30)
    values = np.repeat(centres, 10) + rng.normal(0, 0.01, size=300)
    labels = [f"doc {i}" for i in range(30) for _ in range(10)]
    wide, narrow = interval(values, labels), interval(values)
    assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])


def test_bootstrap_weighs_clusters_by_their_size() -> None:
    values, labels = [1.0] + [0.0] * 9, ["a"] + ["b"] * 9
    assert stats.bootstrap_mean(values, labels) == (0.0, 1.0)
    assert stats.mean(values, labels).value == pytest.approx(0.1)


def test_bootstrap_is_the_same_every_time() -> None:
    values = np.arange(20.0)
    assert stats.bootstrap_mean(values, seed=4) == stats.bootstrap_mean(values, seed=4)
    assert stats.bootstrap_median(values, seed=4) == stats.bootstrap_median(values, seed=4)


def test_bootstrap_blocks_do_not_change_the_coverage() -> None:
    """Many clusters are resampled in blocks of bounded size."""
    values = np.random.default_rng(5).normal(size=60_000)
    low, high = interval(values, resamples=400)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(values.size), rel=0.2)


def test_median_interval_contains_the_median() -> None:
    low, high = stats.bootstrap_median([9.0, 10.0, 10.5, 11.0, 30.0])
    assert low <= 10.5 <= high
    assert low >= 9.0


def test_cluster_labels_must_match() -> None:
    with pytest.raises(ValueError, match="3 values came with 2"):
        stats.cluster_sums([1, 2, 3], ["a", "b"])
