"""What one column of the table says of a row, and the columns that most figures share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qgrid.metrics import METRICS
from qgrid.report import compare, numbers
from qgrid.report.rows import Row
from qgrid.types import Measurement

Section = Literal["", "size", "speed", "quality"]
Tone = Literal["", "fell", "faint", "bad"]
UNPACKED, UNSTABLE, FELL, FLOOR = "†", "~", "▼", "floor"
POOL, BOUND, SLOW, OTHER_KERNEL = "‡", "≥", "slow", "≠"
LEGEND = {
    UNPACKED: "this runtime unpacks the stored weights to compute (see the row's note): no gain in "
    "memory or speed is claimed",
    POOL: "the engine sets its KV pool aside when it starts, so what it reserves is a setting and "
    "not a need: it needs its weights, the activations, and KV cache for the users it has",
    SLOW: "a faster kernel exists for this device (see the surprises)",
    OTHER_KERNEL: "another kernel than the one that was asked for",
    UNSTABLE: "unstable: repeats of this timing vary by more than 5 %, or others were in "
    "its way; `rerun=unstable` times it again",
    BOUND: "at least: the highest load that was measured was not too much",
    FELL: "fell: the whole 95 % interval is below 0, also after Holm's correction over the slices "
    "of the cell",
    FLOOR: "KL divergence that computing in the speed dtype alone makes, weights unchanged",
    "±": "half the 95 % interval, in points; changes are paired with the baseline item by item",
    "x": "over the baseline; printed only where both timings are stable and the 95 % interval of "
    "the ratio excludes 1",
}


@dataclass(frozen=True)
class Text:
    """What one place of the table says.

    `tail` qualifies the number (`±2.1`, `1.33x`) and is aligned on its own; `hint` is the whole
    story for a reader who points at it.
    """

    text: str
    tone: Tone = ""
    hint: str = ""
    tail: str = ""

    @property
    def whole(self) -> str:
        """Number and tail."""
        return f"{self.text} {self.tail}" if self.tail else self.text


@dataclass(frozen=True)
class Column:
    """A column: the lines of its head, what it means, what it says of a row."""

    section: Section
    head: tuple[str, ...]
    title: str
    of: Callable[[Row], Text]
    is_number: bool = True


def plain(
    every: Sequence[Row],
    section: Section,
    metric: str,
    head: tuple[str, ...],
    part: str | None = None,
) -> list[Column]:
    """The column of a metric, where some row has it."""

    def of(row: Row) -> Text:
        measured = row.get(metric, part)
        return nothing(row) if measured is None else Text(number(measured), hint=hint(measured))

    title = METRICS[metric].definition
    return [Column(section, head, title, of)] if has(every, metric, part) else []


def has(every: Sequence[Row], metric: str, part: str | None = None) -> bool:
    """Whether some row has the figure."""
    return any(row.get(metric, part) is not None for row in every)


def nothing(row: Row, why: str = "") -> Text:
    """An empty place: a cell without a record, or without this figure."""
    return Text("" if row.record is None else "-", "faint", why)


def number(measured: Measurement) -> str:
    """A figure with as many digits as a table needs."""
    if measured.metric == "ppl":
        return f"{measured.value:.3f}" if measured.value < 100 else numbers.plain(measured.value)
    return numbers.plain(measured.value)


def hint(measured: Measurement) -> str:
    """Full precision, interval and count."""
    interval = compare.bounds(measured)
    spread = "" if interval is None else f", 95 % interval {interval[0]:.6g} to {interval[1]:.6g}"
    count = "" if measured.n is None else f", n={measured.n}"
    return f"{measured.value:.6g} {measured.unit}{spread}{count}"
