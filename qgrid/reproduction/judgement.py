"""Whether a second run gives the numbers of the first; the rules' reasons: docs/reproduce.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from qgrid import timing
from qgrid.metrics import METRICS
from qgrid.reproduction import answers
from qgrid.reproduction.lock import Answers, Lock, LockedArtifact, LockedCell, Row

Outcome = Literal["reproduced", "drifted", "not judged"]
Key = tuple[str, str | None]  # metric, slice

NEAR = 0.05  # relative, of a peak of memory
FLOOR_BYTES = 16 << 20  # of the same: what threads and allocators keep, however small the model
SPREAD = 2.0  # times the coefficient of variation: 95 % of the repeats of one run


@dataclass(frozen=True)
class Verdict:
    """One number, old and new. `why` says what decided, where it is not plain equality."""

    metric: str  # of `metrics.METRICS`; or `status`, `files` of the artifact, `items` of a slice
    slice: str | None
    outcome: Outcome
    old: float | str | None
    new: float | str | None
    why: str | None = None


@dataclass(frozen=True)
class Circumstances:
    """What a cell's numbers can be held to here."""

    exact: bool  # its runtime gives the same numbers for the same request
    elsewhere: bool  # it was measured on another device


def cell(
    old: tuple[Lock, LockedCell], new: tuple[Lock, LockedCell], given: Circumstances
) -> list[Verdict]:
    """Every verdict about one cell; none about a cell that has no results in the lock."""
    (locked, first), (rerun, second) = old, new
    if first.status is None:
        return []
    same: Outcome = "reproduced" if first.status == second.status else "drifted"
    return [
        Verdict("status", None, same, first.status, second.status),
        *_files(locked.artifacts.get(first.artifact_id), rerun.artifacts.get(second.artifact_id)),
        *_items(_answers(locked, first), _answers(rerun, second), given),
        *_numbers(first, second, given),
    ]


def _answers(lock: Lock, each: LockedCell) -> Mapping[str, Answers]:
    return lock.qualities.get(each.quality_id, {})


def _files(old: LockedArtifact | None, new: LockedArtifact | None) -> Iterator[Verdict]:
    """The artifact's bytes, which equal inputs give again."""
    if old is None or new is None:
        return
    names = dict.fromkeys([*old.files, *new.files])
    others = [name for name in names if old.files.get(name) != new.files.get(name)]
    if not others:
        yield Verdict("files", None, "reproduced", len(names), len(names))
        return
    made = [
        f"{name} {old.versions.get(name)} -> {new.versions.get(name)}"
        for name in dict.fromkeys([*old.versions, *new.versions])
        if old.versions.get(name) != new.versions.get(name)
    ]
    by = f" (made with {', '.join(made)})" if made else ""
    why = f"{len(others)} of {len(names)} have other bytes: {', '.join(others)}{by}"
    yield Verdict("files", None, "drifted", len(names), len(new.files), why)


def _items(
    old: Mapping[str, Answers], new: Mapping[str, Answers], given: Circumstances
) -> Iterator[Verdict]:
    """Item by item, where the runtime is deterministic."""
    for name, known in old.items():
        again = new.get(name)
        if again is None:
            continue  # the slice's numbers are missing, too
        if not given.exact:
            why = "the runtime is not deterministic"
            yield Verdict("items", name, "not judged", known.n, again.n, why)
            continue
        changed, flipped = answers.differing(known, again)
        why = f"{changed} of {known.n} items differ, {flipped} of them in being right"
        outcome: Outcome = "drifted" if changed else "reproduced"
        yield Verdict("items", name, outcome, known.n, again.n, why if changed else None)


def _numbers(old: LockedCell, new: LockedCell, given: Circumstances) -> Iterator[Verdict]:
    before, after = _rows(old), _rows(new)
    for key in dict.fromkeys([*before, *after]):
        first, second = before.get(key), after.get(key)
        if first is None:
            yield _verdict(key, "not judged", first, second, "not in the lock")
        elif second is not None:
            yield _judged(key, first, second, (before, after), given)
        elif old.status == new.status:  # else the status says enough
            yield _gone(key, first)


def _gone(key: Key, old: Row) -> Verdict:
    """A number that the second run does not have; circumstances are told where they matter."""
    metric = METRICS.get(key[0])
    outcome: Outcome = "drifted"
    if metric is None or metric.again == "any":
        outcome = "not judged"
    return _verdict(key, outcome, old, None, "not measured again")


def _rows(each: LockedCell) -> dict[Key, Row]:
    return {(row.metric, row.slice): row for row in each.measurements}


def _verdict(
    key: Key, outcome: Outcome, old: Row | None, new: Row | None, why: str | None
) -> Verdict:
    before, after = (None if row is None else row.value for row in (old, new))
    return Verdict(key[0], key[1], outcome, before, after, why)


def _judged(
    key: Key,
    old: Row,
    new: Row,
    rows: tuple[Mapping[Key, Row], Mapping[Key, Row]],
    given: Circumstances,
) -> Verdict:
    metric = METRICS.get(key[0])
    if metric is None:
        return _verdict(key, "not judged", old, new, "this qgrid does not know the metric")
    if metric.again == "any":
        return _verdict(key, "not judged", old, new, "a circumstance of the timing")
    if metric.is_timing or metric.again == "near":
        if given.elsewhere:
            return _verdict(key, "not judged", old, new, "measured on another device")
        if metric.is_timing:
            return _timing(key, old, new, rows)
        return _near(key, old, new)
    return _exact(key, old, new) if given.exact else _within(key, old, new)


def _exact(key: Key, old: Row, new: Row) -> Verdict:
    if (old.value, old.n) == (new.value, new.n):
        return _verdict(key, "reproduced", old, new, None)
    inside = _is_inside(new.value, old)
    return _verdict(key, "drifted", old, new, "inside the recorded interval" if inside else None)


def _within(key: Key, old: Row, new: Row) -> Verdict:
    """A number of a runtime that is not deterministic; with the same items it moves little."""
    if old.value == new.value:
        return _verdict(key, "reproduced", old, new, None)
    inside = _is_inside(new.value, old)
    if inside is None:
        return _verdict(key, "not judged", old, new, "no interval, and no deterministic runtime")
    return _verdict(key, "reproduced" if inside else "drifted", old, new, "by its interval")


def _is_inside(value: float, row: Row) -> bool | None:
    """Whether a value lies in a row's interval; None: it has none."""
    return None if row.low is None or row.high is None else row.low <= value <= row.high


def _near(key: Key, old: Row, new: Row) -> Verdict:
    floor = FLOOR_BYTES if METRICS[key[0]].unit == "bytes" else 0
    close = abs(new.value - old.value) <= max(NEAR * abs(old.value), floor)
    why = f"within {NEAR:.0%}" + (f" or {FLOOR_BYTES >> 20} MiB" if floor else "")
    return _verdict(key, "reproduced" if close else "drifted", old, new, why)


def _timing(
    key: Key, old: Row, new: Row, rows: tuple[Mapping[Key, Row], Mapping[Key, Row]]
) -> Verdict:
    """Whether the two intervals meet, once each is as wide as runs differ from one another."""
    if any(_value(each, "busy_elsewhere", None) > timing.BUSY for each in rows):
        return _verdict(key, "not judged", old, new, "others computed beside one of the timings")
    gap = _gap(old, new)
    if gap is None:
        return _verdict(key, "not judged", old, new, "a timing without an interval")
    varied = max(_value(each, "timing_cv", key[1]) for each in rows)
    margin = max(timing.UNSTABLE_CV, SPREAD * varied)
    outcome: Outcome = "reproduced" if gap <= 1 + margin else "drifted"
    return _verdict(key, outcome, old, new, f"intervals within {margin:.0%}")


def _value(rows: Mapping[Key, Row], metric: str, slice_name: str | None) -> float:
    row = rows.get((metric, slice_name))
    return 0.0 if row is None else row.value


def _gap(old: Row, new: Row) -> float | None:
    """How far the intervals are apart, as a ratio; up to 1 they overlap. None: there are none."""
    mine, theirs = _positive(old), _positive(new)
    if mine is None or theirs is None:
        return None
    return max(theirs[0] / mine[1], mine[0] / theirs[1])


def _positive(row: Row) -> tuple[float, float] | None:
    """The interval of a row, if it has one and it is above zero."""
    if row.low is None or row.high is None or row.low <= 0:
        return None
    return row.low, row.high
