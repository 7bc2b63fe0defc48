"""The table of a sweep as text, once: terminal, Markdown and HTML only lay it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qgrid.metrics import METRICS
from qgrid.report import compare, numbers, rows
from qgrid.report.rows import Row
from qgrid.types import Measurement, PlannedCell, Record

Section = Literal["", "size", "speed", "quality"]
Tone = Literal["", "fell", "faint", "bad"]
UNPACKED, UNSTABLE, FELL, FLOOR = "†", "~", "▼", "floor"
ALONE = "concurrency=1"


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


@dataclass(frozen=True)
class Sheet:
    """The whole table. Cells of one group compare with the baseline that leads it."""

    columns: tuple[Column, ...]
    groups: tuple[tuple[tuple[Text, ...], ...], ...]
    notes: tuple[tuple[str, str], ...]  # mark, sentence
    rows: tuple[Row, ...] = field(repr=False, default=())


def build(planned: Sequence[PlannedCell], records: Sequence[Record]) -> Sheet:
    """The table of a sweep, refused and unfinished cells included."""
    grouped = rows.groups(planned, records)
    every = [row for group in grouped for row in group]
    numbered = _numbered_notes(every)
    columns = (
        *_axes(every),
        *_sizes(every),
        *_speeds(every),
        *_qualities(every),
        _status(numbered),
    )
    texts = tuple(
        tuple(tuple(column.of(row) for column in columns) for row in group) for group in grouped
    )
    used = [
        row[i].whole
        for group in texts
        for row in group
        for i, column in enumerate(columns)
        if column.section
    ]
    signs = [
        (mark, sentence) for mark, sentence in _LEGEND.items() if any(mark in text for text in used)
    ]
    listed = [(f"[{number}]", note) for note, number in numbered.items()]
    return Sheet(columns, texts, tuple(signs + listed), tuple(every))


_LEGEND = {
    UNPACKED: "this runtime unpacks the stored weights to compute (see the row's note): no gain in "
    "memory or speed is claimed",
    UNSTABLE: "unstable: repeats of this timing vary by more than 5 %, or other processes were in "
    "its way; `rerun=unstable` times it again",
    FELL: "fell: the whole 95 % interval is below 0, also after Holm's correction over the slices "
    "of the cell",
    FLOOR: "KL divergence that computing in the speed dtype alone makes, weights unchanged",
    "±": "half the 95 % interval, in points; changes are paired with the baseline item by item",
    "x": "over the baseline; printed only where both timings are stable and the 95 % interval of "
    "the ratio excludes 1",
}


def _axes(every: Sequence[Row]) -> list[Column]:
    names = list(every[0].labels) if every else []
    return [
        Column("", (name,), f"`{name}` of the cell", _label(name), name in ("bits", "context"))
        for name in names
    ]


def _label(name: str) -> Callable[[Row], Text]:
    return lambda row: Text(row.labels[name])


def _sizes(every: Sequence[Row]) -> list[Column]:
    return [
        *_bytes(every, "size_on_disk_bytes", ("size",), is_memory=False),
        *_plain(every, "size", "bits_per_weight", ("bits per", "weight")),
        *_plain(every, "size", "linear_bits_per_weight", ("of the", "linears")),
        *_bytes(every, "resident_weights_bytes", ("weights", "in memory"), is_memory=True),
        *_bytes(every, "peak_memory_bytes", ("peak", "memory"), is_memory=True),
        *(_kv_bytes(every) if len({row.planned.cell.kv_cache.name for row in every}) > 1 else ()),
    ]


def _kv_bytes(every: Sequence[Row]) -> list[Column]:
    return _plain(every, "size", "kv_bytes_per_token", ("KV bytes", "a token"))


def _bytes(
    every: Sequence[Row], metric: str, head: tuple[str, ...], is_memory: bool
) -> list[Column]:
    found = [m.value for row in every if (m := row.get(metric)) is not None]
    unit, scale = numbers.byte_unit(found)

    def of(row: Row) -> Text:
        measured = row.get(metric)
        if measured is None:
            return _nothing(row)
        mark = UNPACKED if is_memory and row.is_decompressed else ""
        return Text(f"{measured.value / scale:.2f}{mark}", hint=f"{measured.value:,.0f} bytes")

    return [Column("size", (*head, unit), METRICS[metric].definition, of)] if found else []


def _plain(
    every: Sequence[Row], section: Section, metric: str, head: tuple[str, ...]
) -> list[Column]:
    def of(row: Row) -> Text:
        measured = row.get(metric)
        return _nothing(row) if measured is None else Text(_number(measured), hint=_hint(measured))

    title = METRICS[metric].definition
    return [Column(section, head, title, of)] if _any(every, metric) else []


def _speeds(every: Sequence[Row]) -> list[Column]:
    """Prefill and decode for each load in its own column, one request at a time first."""
    return [
        Column("speed", _speed_head(metric, part), METRICS[metric].definition, _speed(metric, part))
        for part in rows.loads(every, "decode_throughput")
        for metric in ("prefill_throughput", "decode_throughput")
        if _any(every, metric, part) and (metric == "decode_throughput" or part == ALONE)
    ]


def _speed_head(metric: str, part: str) -> tuple[str, ...]:
    return METRICS[metric].title, f"batch {rows.concurrency(part)}", "tok/s"


def _speed(metric: str, part: str) -> Callable[[Row], Text]:
    def of(row: Row) -> Text:
        measured = row.get(metric, part)
        if measured is None:
            return _nothing(row)
        unstable = UNSTABLE if row.is_unstable(part) else ""
        unpacked = UNPACKED if row.is_decompressed else ""
        gain = row.ratio(metric, part)
        claim = f"{gain.value:.2f}x" if gain is not None and gain.is_claimed else ""
        hint = _hint(measured)
        if gain is not None:
            hint += f"; {gain.value:.3f}x the baseline ({gain.low:.3f} to {gain.high:.3f})"
        text = f"{unstable}{numbers.plain(measured.value)}{unpacked}"
        return Text(text, hint=hint, tail=claim)

    return of


def _qualities(every: Sequence[Row]) -> list[Column]:
    fell = {row.planned.cell_id: row.fallen for row in every}
    scores = [
        Column(
            "quality",
            (*name.split("_"), "points"),
            f"Accuracy of slice `{name}`: share of the baseline's items answered right, then the "
            "paired change in points.",
            _score(name, fell),
        )
        for name in rows.slices(every)
    ]
    return [
        *_plain(every, "quality", "ppl", ("ppl",)),
        *_divergence(every),
        *_same_top(every),
        *scores,
    ]


def _divergence(every: Sequence[Row]) -> list[Column]:
    """KL divergence; of a baseline the noise floor that its compute dtype alone makes."""

    def of(row: Row) -> Text:
        measured, floor = row.get("kld_mean"), row.get("kld_floor")
        if measured is not None:
            return Text(_number(measured), hint=_hint(measured))
        if floor is not None:
            return Text(_number(floor), "faint", _hint(floor), tail=FLOOR)
        return _nothing(row)

    title = METRICS["kld_mean"].definition
    shown = _any(every, "kld_mean") or _any(every, "kld_floor")
    return [Column("quality", ("KLD", "nats"), title, of)] if shown else []


def _same_top(every: Sequence[Row]) -> list[Column]:
    def of(row: Row) -> Text:
        measured = row.get("same_top_p")
        return _nothing(row) if measured is None else Text(numbers.percent(measured.value))

    title = METRICS["same_top_p"].definition
    return [Column("quality", ("same", "top"), title, of)] if _any(every, "same_top_p") else []


def _score(name: str, fell: dict[str, list[str]]) -> Callable[[Row], Text]:
    """The accuracy of a baseline; of any other cell its paired change."""

    def of(row: Row) -> Text:
        accuracy, change = row.get("accuracy", name), row.get("accuracy_delta", name)
        if row.is_baseline or change is None:
            if accuracy is None:
                return _nothing(row)
            half = numbers.plus_minus(compare.half_width(accuracy))
            return Text(numbers.percent(accuracy.value), hint=_hint(accuracy), tail=half)
        half = numbers.plus_minus(compare.half_width(change))
        hint = _hint(change) + (f"; accuracy {accuracy.value:.4f}" if accuracy else "")
        has_fallen = name in fell[row.planned.cell_id]
        tone: Tone = "fell" if has_fallen else ""
        return Text(numbers.points(change.value), tone, hint, half + (FELL if has_fallen else ""))

    return of


def _status(numbered: dict[str, int]) -> Column:
    def of(row: Row) -> Text:
        marks = [str(numbered[note]) for note in _notes(row)]
        text = row.status + (f" [{','.join(marks)}]" if marks else "")
        tone: Tone = "" if row.status == "ok" else "bad" if row.record is not None else "faint"
        if row.status in ("unsupported", "does_not_fit", "wrong_device", rows.NOT_RUN):
            tone = "faint"
        return Text(text, tone, hint=row.reason or "")

    return Column("", ("status",), "How the cell ended; numbers in brackets are notes.", of, False)


def _numbered_notes(every: Sequence[Row]) -> dict[str, int]:
    notes = dict.fromkeys(note for row in every for note in _notes(row))
    return {note: number for number, note in enumerate(notes, start=1)}


def _notes(row: Row) -> list[str]:
    notes = list(row.notes)
    if row.reason is not None:
        notes.insert(0, row.reason)
    if row.is_decompressed:
        notes.append(row.unpacking)
    return notes


def _any(every: Sequence[Row], metric: str, part: str | None = None) -> bool:
    return any(row.get(metric, part) is not None for row in every)


def _nothing(row: Row) -> Text:
    return Text("" if row.record is None else "-", "faint")


def _number(measured: Measurement) -> str:
    if measured.metric == "ppl":
        return f"{measured.value:.3f}" if measured.value < 100 else numbers.plain(measured.value)
    return numbers.plain(measured.value)


def _hint(measured: Measurement) -> str:
    """Full precision, interval and count."""
    interval = compare.bounds(measured)
    spread = "" if interval is None else f", 95 % interval {interval[0]:.6g} to {interval[1]:.6g}"
    count = "" if measured.n is None else f", n={measured.n}"
    return f"{measured.value:.6g} {measured.unit}{spread}{count}"
