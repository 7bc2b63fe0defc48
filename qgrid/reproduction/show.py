"""Differences and verdicts as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from qgrid.reproduction.differences import Difference
from qgrid.reproduction.judgement import Outcome, Verdict
from qgrid.reproduction.lock import Lock

_DIGITS = 6  # significant, of a number that drifted


def head(lock: Lock) -> str:
    """What the lock is of."""
    measured = sum(each.status is not None for each in lock.cells.values())
    return f"{lock.name}: {len(lock.cells)} cells, {measured} of them with results"


def differences(found: Sequence[Difference], remarks: Sequence[str]) -> Iterator[str]:
    """One line each; one that says so where there is none."""
    yield "differs from the lock:" if found else "nothing differs from the lock"
    yield from (f"- {each}" for each in found)
    yield from (f"note: {each}" for each in remarks)


def cell(label: str, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """A cell and its metrics: what drifted with its numbers, the rest by name."""
    if not verdicts:
        yield f"{label}: no results to compare with"
        return
    drifted = [each for each in verdicts if each.outcome == "drifted"]
    yield f"{label}: {'drifted' if drifted else 'reproduced'}"
    for each in drifted:
        yield f"  drifted: {_numbers(each)}"
    yield f"  reproduced: {_named(verdicts, 'reproduced')}"
    reasons = dict.fromkeys(each.why for each in verdicts if each.outcome == "not judged")
    for why in reasons:
        same = [each for each in verdicts if each.outcome == "not judged" and each.why == why]
        yield f"  not judged ({why}): {_named(same, 'not judged')}"


def _numbers(each: Verdict) -> str:
    where = f" of {each.slice}" if each.slice is not None else ""
    if each.metric in {"items", "files"}:
        return f"{each.metric}{where}: {each.why}"
    why = "" if each.why is None else f" ({each.why})"
    return f"{each.metric}{where}: {_text(each.old)} -> {_text(each.new)}{why}"


def _text(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    return "absent" if value is None else str(value)


def _named(verdicts: Iterable[Verdict], outcome: Outcome) -> str:
    """Metrics of that outcome; of one that several slices have, how many."""
    counts = Counter(each.metric for each in verdicts if each.outcome == outcome)
    return ", ".join(f"{name} ({n}x)" if n > 1 else name for name, n in counts.items()) or "none"


def summary(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """How many cells and numbers came out again."""
    judged = {label: each for label, each in verdicts.items() if each}
    drifted = sum(any(v.outcome == "drifted" for v in each) for each in judged.values())
    counts = Counter(v.outcome for each in judged.values() for v in each)
    cells = f"{len(judged) - drifted} of {len(judged)} cells reproduced"
    return (
        f"{cells}; {counts['reproduced']} numbers reproduced, {counts['drifted']} drifted, "
        f"{counts['not judged']} not judged"
    )
