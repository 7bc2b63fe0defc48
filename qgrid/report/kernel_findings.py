"""Surprises of kernels: one that is slow, and what other kernels make of the same weights (P7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qgrid import codec
from qgrid.report import compare, rows
from qgrid.report.rows import ALONE, Row

_METRICS = {"prefill_throughput": "prefill", "decode_throughput": "decode"}


def slow(row: Row) -> Iterator[str]:
    """The engine's own word that a faster kernel exists for this device."""
    told = row.observed("slow_kernel")
    if told:
        yield f"{str(told).rstrip('.')}."


def other(row: Row) -> Iterator[str]:
    """Another kernel than the one that was asked for."""
    if row.has_other_kernel and row.kernel is not None:
        yield f"`runtime.kernel={row.asked_kernel}` was asked for, `{row.kernel}` came up."


def two(row: Row) -> Iterator[str]:
    """Quality and speed are of different kernels: neither tells of the other's."""
    quality, speed = (row.observed_in(stage, "kernel") for stage in ("quality", "speed"))
    if quality is not None and speed is not None and quality != speed:
        yield (
            f"quality was measured with the kernel `{quality}`, speed with `{speed}`: the dtypes "
            "`runtime.dtype` and `runtime.speed_dtype` have different ones."
        )


def apart(every: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Cells of one artifact that differ in nothing but the kernel, against the first of them.

    Each as the cell's name and what is to be told of it; nothing where a timing is unstable.
    """
    alike: dict[str, list[Row]] = {}
    for row in every:
        if row.status == "ok" and row.kernel is not None:
            alike.setdefault(_but_for_kernel(row), []).append(row)
    for first, *others in alike.values():
        for row in others:
            if row.kernel != first.kernel and (ratios := _ratios(row, first)):
                yield row.name, _story(row, first, ratios)


def _but_for_kernel(row: Row) -> str:
    """Everything that a cell's speed depends on besides its kernel."""
    cell = codec.plain(row.planned.cell)
    cell["runtime"]["options"].pop("kernel", None)
    return codec.digest([row.planned.artifact_id, cell])


def _story(row: Row, first: Row, ratios: Mapping[str, compare.Ratio]) -> str:
    told = [
        f"{name} {ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
        for name, ratio in ratios.items()
        if ratio.is_claimed
    ]
    speed = ", ".join(told) if told else "no difference in speed that these timings can tell"
    return f"the kernel `{row.kernel}` instead of `{first.kernel}` on the same weights: {speed}."


def _ratios(row: Row, first: Row) -> dict[str, compare.Ratio]:
    """What was timed, with its load -> ratio; only of stable timings."""
    found = {
        f"{name} {rows.load_name(part)}": _ratio(row, first, metric, part)
        for part in _loads(row)
        for metric, name in _METRICS.items()
    }
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _loads(row: Row) -> list[str]:
    """One request at a time, and the largest closed loop."""
    found = [part for part in rows.loads([row], "decode_throughput") if rows.is_closed(part)]
    return list(dict.fromkeys([part for part in found if part == ALONE] + found[-1:]))


def _ratio(row: Row, first: Row, metric: str, part: str) -> compare.Ratio | None:
    """The ratio of two stable timings."""
    if row.is_unstable(part) or first.is_unstable(part):
        return None
    return compare.ratio(row.get(metric, part), first.get(metric, part))
