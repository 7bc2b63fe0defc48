"""Per-item results of two cells, paired: changes per slice with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qgrid import stats
from qgrid.metrics import METRICS
from qgrid.types import Measurement

Line = Mapping[str, Any]  # of items.jsonl
Pair = tuple[Line, Line]  # the cell's, the baseline's


class Unpaired(ValueError):
    """Two cells did not evaluate the same items."""


def paired(items: Sequence[Line], baseline_items: Sequence[Line]) -> list[Measurement]:
    """Change of accuracy and, where both tell it, of the answer's log-probability, per slice.

    An item that a server gave one of the two no answer to is left out.

    Raises:
        Unpaired: an item is in one of the two only.
    """
    pairs = _by_slice(items, baseline_items)
    return [measurement for name, each in pairs.items() for measurement in _changes(name, each)]


def _by_slice(items: Sequence[Line], baseline_items: Sequence[Line]) -> dict[str, list[Pair]]:
    known = {(each["slice"], each["id"]): each for each in baseline_items}
    found: dict[str, list[Pair]] = {}
    for each in items:
        other = known.pop((each["slice"], each["id"]), None)
        if other is None:
            raise Unpaired(f"item `{each['id']}` of slice `{each['slice']}` has no baseline result")
        if "failed" not in each and "failed" not in other:
            found.setdefault(each["slice"], []).append((each, other))
    if known:
        name, identity = next(iter(known))
        raise Unpaired(f"item `{identity}` of slice `{name}` has a baseline result only")
    return found


def _changes(name: str, pairs: Sequence[Pair]) -> list[Measurement]:
    clusters = clusters_of([(each["document"], each["id"]) for each, _ in pairs])
    flips = [float(each["correct"]) - float(base["correct"]) for each, base in pairs]
    worse, better = flips.count(-1.0), flips.count(1.0)
    both = sum(each["correct"] and base["correct"] for each, base in pairs)
    neither = len(pairs) - both - worse - better
    alone = stats.newcombe_paired(both, better, worse, neither)
    binary: tuple[float, float] | None = alone
    if clusters is not None:
        # Both: where few items flip, resampling documents alone would show almost no error.
        spread = stats.bootstrap_mean(flips, clusters)
        binary = spread and (min(alone[0], spread[0]), max(alone[1], spread[1]))
    return [
        _change("accuracy_delta", name, flips, clusters, binary),
        *_graded(name, pairs, clusters),
        Measurement("flips_worse", worse, METRICS["flips_worse"].unit, name, n=len(pairs)),
        Measurement("flips_better", better, METRICS["flips_better"].unit, name, n=len(pairs)),
        Measurement(
            "mcnemar_p", stats.mcnemar(worse, better), METRICS["mcnemar_p"].unit, name, n=len(pairs)
        ),
    ]


def _graded(
    name: str, pairs: Sequence[Pair], clusters: Sequence[str] | None
) -> Iterator[Measurement]:
    told = [(each["answer_logprob"], base["answer_logprob"]) for each, base in pairs]
    if any(value is None for pair in told for value in pair):
        return
    graded = [value - known for value, known in told]
    spread = stats.bootstrap_mean(graded, clusters)
    yield _change("answer_logprob_delta", name, graded, clusters, spread)


def _change(
    metric: str,
    name: str,
    values: Sequence[float],
    clusters: Sequence[str] | None,
    interval: tuple[float, float] | None,
) -> Measurement:
    found = stats.mean(values, clusters)
    low, high = interval or (None, None)
    return Measurement(
        metric, found.value, METRICS[metric].unit, name, found.stderr, found.n, low, high
    )


def clusters_of(keys: Sequence[tuple[str | None, str]]) -> list[str] | None:
    """Cluster labels from (document, id); None where no item belongs to a document."""
    if all(document is None for document, _ in keys):
        return None
    return [
        f"item {identity}" if document is None else f"document {document}"
        for document, identity in keys
    ]
