"""Columns of speed: the kernel, throughput at each load, users, cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qgrid.metrics import METRICS
from qgrid.report import numbers, rows
from qgrid.report.columns import (
    BOUND,
    OTHER_KERNEL,
    SLOW,
    UNPACKED,
    UNSTABLE,
    Column,
    Text,
    has,
    hint,
    nothing,
    plain,
)
from qgrid.report.rows import ALONE, Row

MOST_LOADS = 3  # of one kind in the table; more are in the section about loads


def build(every: Sequence[Row]) -> list[Column]:
    """One request at a time first, then what many get; a column only where a row has a figure."""
    return [
        *_kernel(every),
        *_closed(every),
        *_served(every, "output_throughput", "tok/s"),
        *_served(every, "goodput", "req/s"),
        *_users(every, "knee_concurrency", ("knee", "users")),
        *_users(every, "max_users", ("most", "users")),
        *plain(every, "speed", "usd_per_million_output_tokens", ("USD a", "million", "out")),
    ]


def _kernel(every: Sequence[Row]) -> list[Column]:
    """What multiplied, and whether it is what was asked for."""

    def of(row: Row) -> Text:
        if row.has_other_kernel:
            asked = row.asked_kernel
            found = f"not {asked}" if row.kernel is None else row.kernel
            return Text(found, "bad", f"asked for {asked}; {_modules(row)}", OTHER_KERNEL)
        if row.kernel is None:
            return nothing(row)
        slow = row.observed("slow_kernel")
        return Text(row.kernel, hint=_modules(row), tail=SLOW if slow else "")

    title = "What multiplied by the quantized layers, as the engine told."
    shown = any(row.kernel is not None or row.has_other_kernel for row in every)
    return [Column("speed", ("kernel",), title, of, is_number=False)] if shown else []


def _modules(row: Row) -> str:
    """Every kernel with its number of layers: `12 x Q4_K by repack q4_K_8x8 (ggml, q8_K)`."""
    found = row.observed("linear_kernels")
    listed = []
    for each in found if isinstance(found, (list, tuple)) else ():
        if isinstance(each, dict):
            scheme, kernel = each.get("scheme"), each.get("kernel")
            how = ", ".join(str(each[k]) for k in ("method", "dtype") if each.get(k) is not None)
            listed.append(f"{each.get('modules', '?')} x {scheme} by {kernel} ({how})")
    return "; ".join(listed)


def _closed(every: Sequence[Row]) -> list[Column]:
    """Prefill and decode for each closed loop in its own column."""
    parts = [part for part in rows.loads(every, "decode_throughput") if rows.is_closed(part)]
    return [
        Column("speed", _head(metric, part, "tok/s"), METRICS[metric].definition, _of(metric, part))
        for part in _few(parts)
        for metric in ("prefill_throughput", "decode_throughput")
        if has(every, metric, part) and (metric == "decode_throughput" or part == ALONE)
    ]


def _served(every: Sequence[Row], metric: str, unit: str) -> list[Column]:
    """A figure of many requests: at the largest closed loop, and at open ones."""
    parts = rows.loads(every, metric)
    users = [each for each in parts if rows.is_closed(each) and each != ALONE][-1:]
    return [
        Column("speed", _head(metric, part, unit), METRICS[metric].definition, _of(metric, part))
        for part in (*users, *_few([each for each in parts if not rows.is_closed(each)]))
    ]


def _few(parts: Sequence[str]) -> list[str]:
    """All of a few loads; of many the first and the last."""
    return list(parts) if len(parts) <= MOST_LOADS else [parts[0], parts[-1]]


def _head(metric: str, part: str, unit: str) -> tuple[str, ...]:
    return METRICS[metric].title, rows.load_name(part), unit


def _of(metric: str, part: str) -> Callable[[Row], Text]:
    """The figure, marked; a gain over the baseline is claimed where users wait for answers."""

    def of(row: Row) -> Text:
        measured = row.get(metric, part)
        if measured is None:
            return nothing(row)
        unstable = UNSTABLE if row.is_unstable(part) else ""
        unpacked = UNPACKED if row.is_decompressed else ""
        gain = row.ratio(metric, part) if rows.is_closed(part) else None
        claim = f"{gain.value:.2f}x" if gain is not None and gain.is_claimed else ""
        told = hint(measured)
        if gain is not None:
            told += f"; {gain.value:.3f}x the baseline ({gain.low:.3f} to {gain.high:.3f})"
        text = f"{unstable}{numbers.plain(measured.value)}{unpacked}"
        return Text(text, hint=told, tail=claim)

    return of


def _users(every: Sequence[Row], metric: str, head: tuple[str, ...]) -> list[Column]:
    """A number of users, `≥16` where the highest that was tried was not too much."""

    def of(row: Row) -> Text:
        measured = row.get(metric)
        if measured is None:
            return nothing(row)
        bounds = row.observed("at_least")
        least = BOUND if isinstance(bounds, (list, tuple)) and metric in bounds else ""
        shaky = any(row.is_unstable(part) for part in rows.loads([row], "timing_cv"))
        mark = UNSTABLE if shaky else ""
        return Text(f"{mark}{least}{measured.value:.0f}", hint=hint(measured))

    title = METRICS[metric].definition
    return [Column("speed", head, title, of)] if has(every, metric) else []
