"""Surprises of calibration: the same method and bits, and one text worse than another (P5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from qgrid import registry
from qgrid.report import compare, numbers
from qgrid.report.rows import Row
from qgrid.types import Measurement

_NOT_BLIND = ("method", "calibration")  # in what a cell without a text may differ
_AS_WIDE = 1.01  # stored bits of what counts as the same width


def worse(group: Sequence[Row]) -> Iterator[str]:
    """Cells of one baseline whose text costs more than another, or than looking at none."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in group:
        if row.record is not None and row.planned.cell.calibration is not None:
            alike.setdefault(_but_for(row, "calibration"), []).append(row)
    for same in alike.values():
        for row in same:
            for better in _best(same):
                yield from _against(row, better)
            yield from _against_none(row, group)


def _but_for(row: Row, *axes: str) -> tuple[str, ...]:
    return tuple(label for axis, label in row.labels.items() if axis not in axes)


def _best(same: Sequence[Row]) -> list[Row]:
    """The cell nearest to the baseline, and the one whose slices kept most; often the same."""
    near = [row for row in same if row.get("kld_mean") is not None]
    kept = [row for row in same if row.changes]
    found = [min(near, key=_divergence)] if near else []
    if kept:
        found.append(max(kept, key=lambda row: fmean(c.value for c in row.changes.values())))
    return [found[0]] if len(found) == 2 and found[0] is found[1] else found


def _divergence(row: Row) -> float:
    found = row.get("kld_mean")
    return float("inf") if found is None else found.value


def _against(row: Row, better: Row) -> Iterator[str]:
    """What is clearly worse with the text of `row`."""
    if row is better or "calibration" not in row.labels:
        return
    mine, theirs = row.get("kld_mean"), better.get("kld_mean")
    apart = mine is not None and theirs is not None and compare.clearly_above(mine, theirs)
    fell = _further(row, better)
    if not (apart or fell):
        return
    nats = ""
    if mine is not None and theirs is not None:
        nats = f"{numbers.plain(mine.value)} nats against {numbers.plain(theirs.value)}"
    text, other = row.labels["calibration"], better.labels["calibration"]
    told = [f"its KL divergence is {nats}"] if apart else []
    told += [fell] if fell else []
    if nats and not apart:
        told.append(f"KL divergence does not tell ({nats})")
    yield (
        f"{row.name}: the calibration text `{text}` is worse than `{other}` at the same method "
        f"and bits: {'; '.join(told)}."
    )


def _further(row: Row, better: Row) -> str | None:
    """What slices lost more than with the other text: those that tell alone, else all together."""
    theirs = better.changes
    apart = {
        name: found
        for name, mine in row.changes.items()
        if name in theirs and (found := _difference(mine, theirs[name])) is not None
    }
    lowest = sorted(apart, key=lambda name: apart[name].value)
    alone = compare.fallen(apart, {})
    if alone:
        listed = ", ".join(_lost(name, apart[name]) for name in lowest if name in alone)
        return f"slices that fell further: {listed}"
    mean = compare.mean_change(list(apart.values()))
    if mean is None or mean.high >= 0:
        return None
    more, least, most = (f"{-100 * each:.1f}" for each in (mean.value, mean.high, mean.low))
    return (
        f"its slices lost {more} points more on the mean ({least} to {most}), most of all "
        f"{_lost(lowest[0], apart[lowest[0]])}"
    )


def _lost(name: str, change: Measurement) -> str:
    return f"`{name}` {numbers.points(change.value)} points"


def _difference(mine: Measurement, theirs: Measurement) -> Measurement | None:
    """Of two changes, as if independent: both rest on the same items, so that less is told."""
    own, other = compare.half_width(mine), compare.half_width(theirs)
    if own is None or other is None:
        return None
    value, half = mine.value - theirs.value, (own**2 + other**2) ** 0.5
    return Measurement("accuracy_delta", value, mine.unit, low=value - half, high=value + half)


def _against_none(row: Row, group: Sequence[Row]) -> Iterator[str]:
    """A method that looks at no text, takes no more bits, and is nearer to the baseline."""
    mine, bits = row.get("kld_mean"), row.get("linear_bits_per_weight")
    if mine is None or bits is None:
        return
    blind = [
        each
        for each in group
        if each.planned.cell.calibration is None
        and _is_from_base(each)
        and _but_for(each, *_NOT_BLIND) == _but_for(row, *_NOT_BLIND)
        and (stored := each.get("linear_bits_per_weight")) is not None
        and stored.value <= _AS_WIDE * bits.value
        and (theirs := each.get("kld_mean")) is not None
        and compare.clearly_above(mine, theirs)
    ]
    if blind:
        best = min(blind, key=_divergence)
        yield (
            f"{row.name}: `{best.labels['method']}`, which looks at no calibration text, is nearer "
            f"to the baseline at the same bits: KL divergence {numbers.plain(_divergence(best))} "
            f"nats against {numbers.plain(mine.value)}."
        )


def _is_from_base(row: Row) -> bool:
    """Whether qgrid made the weights: of others it is not known what text they saw."""
    method = row.planned.cell.method
    return method.name in registry.names("methods") and registry.support(method).from_base
