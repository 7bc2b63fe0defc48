"""Prose where an engine tells only the likeliest tokens: exact perplexity, a bound of the KL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qgrid.contracts import InvalidEngine
from qgrid.measure.prose import Tokens, Windows, mean_over_windows, root_mean_square
from qgrid.types import Measurement

if TYPE_CHECKING:
    from qgrid.contracts import Engine, TopScores

Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
MOST_FAILED = 0.1  # share of windows, or of a slice's items, that may go without an answer
_ROUNDING = 1e-6  # of a sum of probabilities that were sent as single precision


class TooManyFailed(RuntimeError):
    """A server left so many requests without an answer that the rest would not be the same text."""


@dataclass(frozen=True)
class Top:
    """What an engine told of the windows that it answered, by the window's number.

    `ids` and `logprobs` `(scored, k)` are the likeliest tokens, likeliest first; `chosen`
    `(scored,)` is the log-probability of the token that stands there. `failed` gives the reason
    for every other window.
    """

    ids: Mapping[int, Ids]
    logprobs: Mapping[int, Array]
    chosen: Mapping[int, Array]
    failed: Mapping[int, str]


def require_answers(failed: Sequence[str], total: int, what: str) -> None:
    """Refuse to go on with what a server left over; `failed` are the reasons of the others.

    Raises:
        TooManyFailed: more than `MOST_FAILED` of `total` got no answer.
    """
    if len(failed) > MOST_FAILED * total:
        raise TooManyFailed(
            f"{len(failed)} of {total} {what} got no answer ({MOST_FAILED:.0%} may be left out); "
            f"the last one: {failed[-1]}"
        )


def told(engine: Engine, windows: Windows) -> Top:
    """Ask the engine about every window.

    Raises:
        NoLogprobs: it gives none.
        InvalidEngine: a log-probability is NaN or infinite.
        TooManyFailed: too many windows without an answer.
    """
    parts: dict[int, list[TopScores]] = {}
    failed: dict[int, str] = {}
    rows: Iterator[TopScores] = engine.score(windows.ids, [windows.scored] * len(windows))  # type: ignore[assignment] # of an engine with `truncated`
    for each in rows:
        if each.error is None:
            parts.setdefault(each.sequence, []).append(each)
        else:
            failed[each.sequence] = each.error
    require_answers(list(failed.values()), len(windows), "windows of prose")
    chosen = {w: np.concatenate([p.chosen for p in found]) for w, found in parts.items()}
    if not all(np.isfinite(values).all() for values in chosen.values()):
        raise InvalidEngine("the engine computed NaN or infinity as a log-probability of prose")
    return Top(
        ids={w: np.concatenate([p.ids for p in found]) for w, found in parts.items()},
        logprobs={w: np.concatenate([p.logprobs for p in found]) for w, found in parts.items()},
        chosen=chosen,
        failed=failed,
    )


def alone(cell: Top) -> Tokens:
    """Log-probabilities of every token of the answered windows, compared with nothing."""
    nll = -np.stack([cell.chosen[w] for w in sorted(cell.chosen)])
    return Tokens(nll, *(np.full(nll.shape, np.nan) for _ in range(4)))


def paired(cell: Top, base: Top) -> Tokens:
    """Numbers of every token of the windows that both answered; `kl` is the truncated one.

    `kl` and `same_top` are NaN where one of the two gives no lists.
    """
    both = sorted(cell.chosen.keys() & base.chosen.keys())
    if not both:
        raise TooManyFailed("the cell and its baseline answered no window of prose in common")
    ours, theirs = (np.stack([each.chosen[w] for w in both]) for each in (cell, base))
    kl, same = (np.full(ours.shape, np.nan) for _ in range(2))
    if all(each.ids[w].shape[1] for each in (cell, base) for w in both):
        for place, w in enumerate(both):
            lists = (base.ids[w], base.logprobs[w], cell.ids[w], cell.logprobs[w])
            kl[place] = divergence(*lists)
            same[place] = base.ids[w][:, 0] == cell.ids[w][:, 0]
    return Tokens(-ours, -theirs, kl, same, np.exp(ours) - np.exp(theirs))


def divergence(base_ids: Ids, base: Array, cell_ids: Ids, cell: Array) -> Array:
    """KL(base || cell) in nats `(rows,)` of two distributions of which only parts are known.

    Over the partition {every token that is in both lists} + {all others as one}. Merging outcomes
    never raises a KL divergence (data-processing inequality: Cover and Thomas, Elements of
    Information Theory, 2.8), so that this is a lower bound of the full one; with lists of the whole
    vocabulary the two are equal.
    """
    pairs = zip(base_ids, base, cell_ids, cell, strict=True)
    return np.array([_of_row(*row) for row in pairs])


def _of_row(base_ids: Ids, base: Array, cell_ids: Ids, cell: Array) -> float:
    _, ours, theirs = np.intersect1d(base_ids, cell_ids, assume_unique=True, return_indices=True)
    p, q = base[ours], cell[theirs]
    inside = float(np.sum(np.exp(p) * (p - q)))
    rest = max(0.0, 1.0 - float(np.exp(p).sum()))
    other = max(_ROUNDING, 1.0 - float(np.exp(q).sum()))
    return inside + (rest * math.log(rest / other) if rest > 0 else 0.0)


def against_baseline(tokens: Tokens) -> list[Measurement]:
    """What truncated rows tell of the change; standard errors clustered by window.

    Never under the name of a full KL divergence: `kld_topk_mean` is a lower bound.
    """
    found = [mean_over_windows("ln_ppl_ratio", tokens.nll - tokens.base_nll)]
    if np.isfinite(tokens.kl).all():
        found += [
            mean_over_windows("kld_topk_mean", tokens.kl),
            mean_over_windows("same_top_p", tokens.same_top),
        ]
    return [
        *found,
        mean_over_windows("delta_p_mean", tokens.delta_p),
        root_mean_square("delta_p_rms", tokens.delta_p),
    ]
