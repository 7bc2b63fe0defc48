"""One sentence per surprise: what a reader of the table would want to be told first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qgrid.report import (
    calibration_findings,
    compare,
    kernel_findings,
    load_findings,
    numbers,
    rows,
    timing_findings,
)
from qgrid.report.rows import Row
from qgrid.types import Measurement, PlannedCell, Record

FINE_DROP = 0.01  # a mean that lost at most a point looks harmless
TOO_GOOD = 0.01  # a gain whose lower bound is above a point is not believed
HIGH_FLOOR = 0.01  # nats; computing in 16 bits costs a hundredth of that
MASTERED = 0.98
MOST_NAMES = 6
SURPLUS_BITS, SURPLUS_SHARE = 1.0, 0.25  # stored above asked, whichever is larger
SURPLUS_BYTES, SURPLUS_SIZE = 2 * numbers.MIB, 0.10


def surprises(planned: Sequence[PlannedCell], records: Sequence[Record]) -> list[str]:
    """Sentences about what is not as it should be, the gravest kinds first.

    What several cells share is said once.
    """
    grouped = rows.groups(planned, records)
    measured = [row for group in grouped for row in group if row.record is not None]
    names: dict[str, list[str]] = {}
    for find in (
        _fallen,
        _gains,
        _floor,
        kernel_findings.other,
        kernel_findings.slow,
        kernel_findings.two,
        load_findings.sentences,
        _larger,
        _fallbacks,
        _failed_checks,
        _left_out,
        _unpacked,
    ):
        for row in measured:
            for story in find(row):
                names.setdefault(story, []).append(row.name)
    for name, story in kernel_findings.apart(measured):
        names.setdefault(story, []).append(name)
    found = [f"{_listed(cells)}: {story}" for story, cells in names.items()]
    for story, cells in timing_findings.disturbed(measured):
        found.append(f"{_listed(cells)}: {story}")
    for group in grouped:
        found += calibration_findings.worse(group)
        found += _rising_divergence(group)
        found += _uninformative(group[0])
    return list(dict.fromkeys(found))


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _fallen(row: Row) -> Iterator[str]:
    """Slices whose paired change is below 0; a harmless mean is named beside them (P9)."""
    changes = row.changes
    fallen = sorted(row.fallen, key=lambda name: changes[name].value)
    if not fallen:
        return
    listed = ", ".join(f"`{name}` {_change(changes[name])}" for name in fallen)
    several = "slices fell" if len(fallen) > 1 else "a slice fell"
    mean = compare.mean_change(list(changes.values()))
    tail = ""
    if mean is not None and len(changes) > len(fallen) and mean.value >= -FINE_DROP:
        tail = f", although the mean over {len(changes)} slices changed by only "
        tail += f"{numbers.points(mean.value)} points"
    yield f"{several}: {listed}{tail}."


def _change(change: Measurement) -> str:
    interval = compare.bounds(change)
    text = f"{numbers.points(change.value)} points"
    if interval is None:
        return text
    return f"{text} ({numbers.points(interval[0])} to {numbers.points(interval[1])})"


def _gains(row: Row) -> Iterator[str]:
    """Quantization does not teach: a clear gain points at the measurement."""
    for name, change in row.changes.items():
        interval = compare.bounds(change)
        if interval is not None and interval[0] > TOO_GOOD:
            yield f"`{name}` gained {_change(change)}, which is implausible; check it."
    ratio = row.get("ln_ppl_ratio")
    interval = compare.bounds(ratio) if ratio is not None and not row.is_baseline else None
    if interval is not None and interval[1] < -TOO_GOOD:
        yield "perplexity is better than the baseline's, which is implausible; check it."


def _floor(row: Row) -> Iterator[str]:
    floor = row.get("kld_floor")
    if floor is not None and floor.value > HIGH_FLOOR:
        yield (
            f"computing in {row.planned.cell.runtime.speed_dtype} alone makes a KL divergence of "
            f"{numbers.plain(floor.value)} nats, which is implausible; check it."
        )


def _larger(row: Row) -> Iterator[str]:
    """Artifacts that take more than what was asked for."""
    asked, stored = row.planned.cell.bits, row.get("linear_bits_per_weight")
    mixed = row.planned.cell.method.options.get("keep")  # other widths were asked for as well
    if (
        stored is not None
        and not mixed
        and stored.value - asked > max(SURPLUS_BITS, SURPLUS_SHARE * asked)
    ):
        yield (
            f"the linears take {stored.value:.2f} bits per weight, more than the {asked} asked for."
        )
    size, base = row.get("size_on_disk_bytes"), row.baseline.get(("size_on_disk_bytes", None))
    if size is None:
        return
    if base is not None and asked < 16 and size.value >= base.value:
        yield (f"takes {_mib(size.value)} on disk, no less than the baseline's {_mib(base.value)}.")
    planned = row.planned.predicted.get("weight_bytes")
    if planned is not None and size.value - planned > max(SURPLUS_BYTES, SURPLUS_SIZE * planned):
        yield f"takes {_mib(size.value)} on disk, {_mib(planned)} were planned."


def _mib(value: float) -> str:
    unit, scale = numbers.byte_unit([value])
    return f"{value / scale:.2f} {unit}"


def _fallbacks(row: Row) -> Iterator[str]:
    """Linear layers that another method than the one asked for made, or none."""
    asked = row.planned.cell.method.name
    made = module_methods(row.record.artifact) if row.record is not None else {}
    own = {asked, "none"} if row.planned.cell.method.options.get("keep") else {asked}
    strangers = {name: count for name, count in made.items() if name not in own}
    if strangers and asked in made:
        listed = ", ".join(f"{count} by `{name}`" for name, count in strangers.items())
        total = sum(made.values())
        yield f"not all {total} linears were made by `{asked}`: {listed}."


def module_methods(artifact: Mapping[str, Any]) -> dict[str, int]:
    """Method -> number of linears, from a histogram or from the manifest's list of modules."""
    found: dict[str, int] = {}
    for entry, value in _mapping(artifact.get("modules")).items():
        if isinstance(value, Mapping):
            method, count = str(value.get("method", entry)), value.get("count", 1)
        else:
            method, count = str(entry).split(" ")[0], value
        if isinstance(count, int):
            found[method] = found.get(method, 0) + count
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _failed_checks(row: Row) -> Iterator[str]:
    """Checks that failed without ending the cell."""
    for check in row.record.checks if row.record is not None else ():
        if not check.ok and not check.fatal:
            yield (f"check `{check.name}` expected {check.expected}, found {check.actual}.")


def _left_out(row: Row) -> Iterator[str]:
    for key, where in (("left_out", ""), ("left_out_of_baseline", " of the baseline")):
        for name, reason in _mapping(row.observed(key)).items():
            what = name if name == "prose" else f"slice `{name}`"
            yield f"{what}{where} was left out: {reason}."


def _unpacked(row: Row) -> Iterator[str]:
    if row.is_decompressed:
        yield (
            f"`{row.planned.cell.runtime.name}` unpacks the weights ("
            f"{row.unpacking}), so it saves disk, but neither memory nor time."
        )


def _rising_divergence(group: Sequence[Row]) -> Iterator[str]:
    """More bits, yet farther from the baseline by more than both standard errors explain."""
    last: dict[tuple[str, ...], Row] = {}
    for row in sorted(group, key=lambda row: row.planned.cell.bits):
        now = row.get("kld_mean")
        if row.is_baseline or now is None:
            continue
        others = tuple(label for axis, label in row.labels.items() if axis != "bits")
        fewer = last.get(others)
        before = None if fewer is None else fewer.get("kld_mean")
        if fewer is not None and before is not None and compare.clearly_above(now, before):
            yield (
                f"{row.name}: its KL divergence ({numbers.plain(now.value)} nats) is larger "
                f"than at {fewer.planned.cell.bits} bits ({numbers.plain(before.value)})."
            )
        last[others] = row


def _uninformative(row: Row) -> Iterator[str]:
    """Slices on which no quantization can show: mastered, or no better than guessing."""
    if not row.is_baseline:
        return
    for name in rows.slices([row]):
        accuracy = row.get("accuracy", name)
        if accuracy is None:
            continue
        interval = compare.bounds(accuracy)
        share = numbers.percent(accuracy.value)
        if accuracy.value > MASTERED:
            story = f"{share} right, so it can hardly fall"
        elif interval is not None and interval[0] <= (guess := _chance(row, name)):
            story = f"{share} right, which {accuracy.n or 'its'} items do not tell from guessing"
            story += f" ({numbers.percent(guess)})"
        else:
            continue
        yield f"`{name}` is uninformative: {row.name} answers {story}."


def _chance(row: Row, name: str) -> float:
    """Expected accuracy of guessing; 0 where replies are free or the slice's file is gone."""
    from qgrid import codec
    from qgrid.measure import slices

    wanted = row.planned.cell.slices.items[name]
    if wanted.scoring != "choice":
        return 0.0
    try:
        items = slices.load(name, wanted, row.planned.cell.seed)
    except (OSError, ValueError, codec.InvalidValue):
        return 0.0
    return sum(1 / len(item.choices) for item in items) / len(items)
