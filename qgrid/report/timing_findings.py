"""What speaks against timings, once for all cells: neighbours, late readings, unlike repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qgrid import timing
from qgrid.report import rows
from qgrid.report.rows import Row

_BUSY = (
    "other processes kept {} of the processors busy that the timing wanted; free the machine and "
    "give `rerun=unstable`."
)
_MERGED = (
    "first tokens were read together with the second, so that TTFT is too long and TPOT too "
    "short, in {} of the requests: the load generator waited for a processor, or the server sends "
    "tokens in bundles."
)
_SPREAD = "the timing is unstable, its repeats vary by {}."


def disturbed(measured: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """Second halves of sentences, each with the names of its cells."""
    for form, (spread, cells) in (
        (_BUSY, _busy(measured)),
        (_MERGED, _shares(measured, "merged_first_tokens")),
        (_SPREAD, _shares(measured, "timing_cv")),
    ):
        if cells:
            yield form.format(spread), cells


def _busy(measured: Sequence[Row]) -> tuple[str, list[str]]:
    found = {row.name: each for row in measured if (each := row.get("busy_elsewhere")) is not None}
    against = {name: each.value for name, each in found.items() if timing.is_unstable(each)}
    return _span([f"{value:.1f}" for value in sorted(against.values())]), list(against)


def _shares(measured: Sequence[Row], metric: str) -> tuple[str, list[str]]:
    """The loads at which shares speak against a timing (`7 to 12 % at batch 4`), and the cells."""
    told, cells = [], dict[str, None]()
    for part in rows.loads(measured, metric):
        found = {row.name: each for row in measured if (each := row.get(metric, part)) is not None}
        against = {name: each.value for name, each in found.items() if timing.is_unstable(each)}
        if against:
            span = _span([f"{100 * value:.0f}" for value in sorted(against.values())])
            told.append(f"{span} % at {rows.load_name(part)}")
            cells |= dict.fromkeys(against)
    return ", ".join(told), list(cells)


def _span(values: Sequence[str]) -> str:
    """The first and the last, once where they are alike."""
    return " to ".join(dict.fromkeys([*values[:1], *values[-1:]]))
