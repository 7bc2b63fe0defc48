"""Perplexity and KL divergence: rows of two engines in lockstep, a few numbers per token kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from qgrid import stats
from qgrid.contracts import InvalidEngine
from qgrid.metrics import METRICS
from qgrid.types import Measurement

if TYPE_CHECKING:
    import torch

    from qgrid.contracts import Engine, Scores

Array = npt.NDArray[np.float64]
_BLOCK_BYTES = 64 * 2**20  # of one temporary tensor
_PERCENTILES = {
    "kld_median": 0.5,
    "kld_p90": 0.9,
    "kld_p95": 0.95,
    "kld_p99": 0.99,
    "kld_p999": 0.999,
    "kld_max": 1.0,
}


class TooShort(ValueError):
    """The prose fills not even one window."""


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of prose; the last `scored` tokens of each count."""

    ids: tuple[tuple[int, ...], ...]
    scored: int

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, first: int, stop: int | None = None) -> Windows:
        """Some of the windows."""
        return Windows(self.ids[first:stop], self.scored)


@dataclass(frozen=True)
class Tokens:
    """Numbers of every scored token, each `(windows, scored)`.

    All but `nll` need a baseline. `same_top` is 0 or 1.
    """

    nll: Array
    base_nll: Array
    kl: Array
    same_top: Array
    delta_p: Array

    @classmethod
    def empty(cls, windows: Windows) -> Tokens:
        """Room for the numbers; NaN marks what no chunk has filled."""
        return cls(*(np.full((len(windows), windows.scored), np.nan) for _ in range(5)))


def cut(
    ids: Sequence[int], context: int, protocol: str = "gptq", bos: int | None = None
) -> Windows:
    """Disjoint windows of `context` tokens, the tail dropped.

    `gptq` scores all but the first token. `llamacpp` scores the second half, each token with at
    least half a window before it, and puts `bos`, where the tokenizer has one, in the place of
    each window's first token; source: llama.cpp's perplexity tool.

    Raises:
        TooShort: fewer tokens than one window has, or nothing left to score.
    """
    windows = tuple(
        tuple(ids[begin : begin + context]) for begin in range(0, len(ids) - context + 1, context)
    )
    scored = context - 1 if protocol == "gptq" else context - 1 - context // 2
    if not windows or scored < 1:
        raise TooShort(
            f"`context={context}` needs that many tokens of prose, and at least 2 (3 for "
            f"`llamacpp`); the prose has {len(ids)}; lower `context` or give more prose"
        )
    if protocol == "llamacpp" and bos is not None:
        windows = tuple((bos, *window[1:]) for window in windows)
    return Windows(windows, scored)


def rows(engine: Engine, windows: Windows) -> Iterator[Scores]:
    """Full distributions of the scored tokens of every window."""
    found = engine.score(windows.ids, [windows.scored] * len(windows))
    return cast("Iterator[Scores]", found)  # truncated rows go through `truncated`


def collect(
    tokens: Tokens,
    windows: Windows,
    cell: Iterator[Scores],
    baseline: Iterator[Scores] | None,
    first: int = 0,
) -> None:
    """Fill `tokens` from chunk after chunk; `first` is the window that the iterators begin with.

    Raises:
        InvalidEngine: the two engines cut their rows differently, or a row holds NaN.
    """
    for scores in cell:
        window = first + scores.sequence
        ids = windows.ids[window]
        targets = ids[scores.start : scores.start + len(scores.logprobs)]
        begin = scores.start - (len(ids) - windows.scored)
        place = np.s_[window, begin : begin + len(targets)]
        base = next(baseline, None) if baseline is not None else None
        if baseline is not None:
            _require_same(scores, base)
        _fill(tokens, place, scores, base, targets)
    done = np.s_[first : window + 1]
    if not np.isfinite(tokens.nll[done]).all():
        raise InvalidEngine("the engine computed NaN or infinity as a log-probability of prose")
    if baseline is not None and not np.isfinite(tokens.kl[done]).all():
        raise InvalidEngine("the KL divergence from the baseline is NaN or infinite on prose")


def _require_same(cell: Scores, base: Scores | None) -> None:
    if base is None or (cell.sequence, cell.start, cell.logprobs.shape) != (
        base.sequence,
        base.start,
        base.logprobs.shape,
    ):
        raise InvalidEngine("the cell and its baseline gave rows of different tokens or vocabulary")


def _fill(
    tokens: Tokens,
    place: tuple[int, slice],
    cell: Scores,
    base: Scores | None,
    targets: Sequence[int],
) -> None:
    import torch

    device = cell.logprobs.device
    wanted = torch.tensor(targets, device=device)[:, None]
    chosen = cell.logprobs.gather(1, wanted)[:, 0].double()
    tokens.nll[place] = -chosen.cpu().numpy()
    if base is None:
        return
    reference = base.logprobs.to(device)
    known = reference.gather(1, wanted)[:, 0].double()
    tokens.base_nll[place] = -known.cpu().numpy()
    tokens.delta_p[place] = (chosen.exp() - known.exp()).cpu().numpy()
    same = cell.logprobs.argmax(1) == reference.argmax(1)
    tokens.same_top[place] = same.double().cpu().numpy()
    tokens.kl[place] = divergence(reference, cell.logprobs).double().cpu().numpy()


def divergence(base: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """KL(base || cell) in nats of every row, from log-probabilities `(rows, vocab)` in fp32."""
    import torch

    size = max(1, _BLOCK_BYTES // (4 * base.shape[1]))
    pairs = zip(torch.split(base, size), torch.split(cell, size), strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(1) for p, q in pairs])


def perplexity(tokens: Tokens) -> Measurement:
    """exp of the mean of the window means; the interval comes from the windows' spread."""
    means = tokens.nll.mean(axis=1)
    estimate = stats.mean(means)
    value = math.exp(estimate.value)
    known = estimate.stderr is not None
    return Measurement(
        metric="ppl",
        value=value,
        unit=METRICS["ppl"].unit,
        stderr=value * estimate.stderr if estimate.stderr is not None else None,
        n=tokens.nll.size,
        low=math.exp(estimate.low) if known and estimate.low is not None else None,
        high=math.exp(estimate.high) if known and estimate.high is not None else None,
    )


def against_baseline(tokens: Tokens) -> list[Measurement]:
    """KL divergence, agreement and perplexity ratio, standard errors clustered by window."""
    kl = tokens.kl.ravel()
    spread = [
        _bare(metric, stats.percentile(kl, fraction), kl.size)
        for metric, fraction in _PERCENTILES.items()
    ]
    return [
        mean_over_windows("ln_ppl_ratio", tokens.nll - tokens.base_nll),
        mean_over_windows("kld_mean", tokens.kl),
        *spread,
        mean_over_windows("same_top_p", tokens.same_top),
        mean_over_windows("delta_p_mean", tokens.delta_p),
        root_mean_square("delta_p_rms", tokens.delta_p),
    ]


def mean_over_windows(metric: str, values: Array) -> Measurement:
    """The mean of `(windows, tokens)` with its error clustered by window."""
    labels = np.repeat(np.arange(values.shape[0]), values.shape[1]).tolist()
    found = stats.mean(values.ravel(), labels)
    return Measurement(
        metric,
        found.value,
        METRICS[metric].unit,
        stderr=found.stderr,
        n=found.n,
        low=found.low,
        high=found.high,
    )


def root_mean_square(metric: str, values: Array) -> Measurement:
    """The root mean square of `(windows, tokens)`, without an error."""
    return _bare(metric, math.sqrt(float(np.mean(values**2))), values.size)


def _bare(metric: str, value: float, n: int) -> Measurement:
    return Measurement(metric, value, METRICS[metric].unit, n=n)
