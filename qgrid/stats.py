"""Paired statistics: pure numpy, deterministic, the same for every metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
RESAMPLES = 10_000
_BLOCK_BYTES = 64 * 2**20  # of resampling indices held at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and 95 % interval, from `n` values."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int


def percentile(values: npt.ArrayLike, fraction: float) -> float:
    """The value at position `fraction * (n - 1)` of the sorted values, interpolated linearly."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("a percentile needs at least one value; none came")
    return float(np.quantile(array, fraction, method="linear"))


def normal_quantile(confidence: float = 0.95) -> float:
    """Half-width of a two-sided normal interval in standard errors (1.96 for 95 %)."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def cluster_sums(
    values: npt.ArrayLike, clusters: Sequence[Any] | None = None
) -> tuple[Array, Array]:
    """Sum and number of values of every cluster, both `(clusters,)`; by default each is its own."""
    array = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return array, np.ones_like(array)
    if len(clusters) != len(array):
        raise ValueError(f"{len(array)} values came with {len(clusters)} cluster labels")
    number = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[label] for label in clusters], dtype=np.int64)
    sums = np.bincount(index, weights=array, minlength=len(number)).astype(np.float64)
    return sums, np.bincount(index, minlength=len(number)).astype(np.float64)


def clustered_stderr(values: npt.ArrayLike, clusters: Sequence[Any] | None = None) -> float | None:
    """Standard error of the mean where values of one cluster are not independent.

    With clusters of one value it is the familiar s / sqrt(n). None for fewer than two clusters.
    """
    sums, counts = cluster_sums(values, clusters)
    groups = len(sums)
    if groups < 2:
        return None
    residuals = sums - counts * (sums.sum() / counts.sum())
    scale = groups / (groups - 1)
    return float(math.sqrt(scale * float(residuals @ residuals)) / counts.sum())


def mean(values: npt.ArrayLike, clusters: Sequence[Any] | None = None) -> Estimate:
    """Mean with clustered standard error and normal interval."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("a mean needs at least one value; none came")
    value, stderr = float(array.mean()), clustered_stderr(array, clusters)
    if stderr is None:
        return Estimate(value, None, None, None, array.size)
    half = normal_quantile() * stderr
    return Estimate(value, stderr, value - half, value + half, array.size)


def bootstrap_mean(
    values: npt.ArrayLike,
    clusters: Sequence[Any] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean; whole clusters are drawn.

    For paired differences this is the paired bootstrap. None for fewer than two clusters, which
    say nothing of their spread.
    """
    sums, counts = cluster_sums(values, clusters)
    if len(sums) < 2:
        return None
    means = np.concatenate(list(_resampled_means(sums, counts, resamples, seed)))
    return percentile(means, 0.025), percentile(means, 0.975)


def _resampled_means(sums: Array, counts: Array, resamples: int, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    groups = len(sums)
    block = max(1, _BLOCK_BYTES // (8 * groups))
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        drawn = rng.integers(groups, size=(size, groups))
        yield sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)


def bootstrap_median(
    values: npt.ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the median."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_BYTES // (8 * array.size))
    medians = [
        np.median(array[rng.integers(array.size, size=(n, array.size))], axis=1)
        for n in _blocks(resamples, block)
    ]
    joined = np.concatenate(medians)
    return percentile(joined, 0.025), percentile(joined, 0.975)


def _blocks(total: int, block: int) -> list[int]:
    return [min(block, total - begin) for begin in range(0, total, block)]


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} is not a proportion")
    z = normal_quantile(confidence)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bound is exactly 0 and 1; rounding must not move it past.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def newcombe_paired(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Newcombe's score interval (his method 10) of the paired difference of two proportions.

    The difference is first less second: (only_first - only_second) / n.
    """
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    low1, high1 = wilson(first, n, confidence)
    low2, high2 = wilson(second, n, confidence)
    share1, share2 = first / n, second / n
    phi = _phi(both, only_first, only_second, neither)
    down = (share1 - low1, high2 - share2)
    up = (high1 - share1, share2 - low2)
    delta = share1 - share2
    low = delta - math.sqrt(down[0] ** 2 - 2 * phi * down[0] * down[1] + down[1] ** 2)
    high = delta + math.sqrt(up[0] ** 2 - 2 * phi * up[0] * up[1] + up[1] ** 2)
    return low, high


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Correlation of the pairs, with Newcombe's continuity correction where it is positive."""
    n = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    margins = first * (n - first) * second * (n - second)
    if margins == 0:
        return 0.0
    cross = float(both * neither - only_first * only_second)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    return cross / math.sqrt(margins)


def mcnemar(worse: int, better: int) -> float:
    """Exact one-sided p: at least `worse` of the flips are for the worse, by a fair coin."""
    flips = worse + better
    ways = sum(math.comb(flips, k) for k in range(worse, flips + 1))
    return float(ways / 2**flips)


def mcnemar_two_sided(worse: int, better: int) -> float:
    """Exact two-sided p of the flips by a fair coin."""
    return min(1.0, 2 * mcnemar(max(worse, better), min(worse, better)))
