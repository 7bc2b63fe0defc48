"""The table of a sweep as text, once: terminal, Markdown and HTML only lay it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qgrid.report import qualities, rows, sizes, speeds
from qgrid.report.columns import LEGEND, Column, Text, Tone
from qgrid.report.rows import Row
from qgrid.types import PlannedCell, Record


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
        *sizes.build(every),
        *speeds.build(every),
        *qualities.build(every),
        _status(numbered),
    )
    texts = tuple(
        tuple(tuple(column.of(row) for column in columns) for row in group) for group in grouped
    )
    signs = [(mark, LEGEND[mark]) for mark in LEGEND if mark in _marked(columns, texts)]
    listed = [(f"[{number}]", note) for note, number in numbered.items()]
    return Sheet(columns, texts, tuple(signs + listed), tuple(every))


def _marked(columns: Sequence[Column], groups: Sequence[Sequence[Sequence[Text]]]) -> str:
    """Everything in the table that may hold a mark: figures, and the tails of names."""
    return " ".join(
        place.whole if column.is_number else place.tail
        for group in groups
        for row in group
        for column, place in zip(columns, row, strict=True)
        if column.section
    )


def _axes(every: Sequence[Row]) -> list[Column]:
    names = list(every[0].labels) if every else []
    return [
        Column("", (name,), f"`{name}` of the cell", _label(name), name in ("bits", "context"))
        for name in names
    ]


def _label(name: str) -> Callable[[Row], Text]:
    return lambda row: Text(row.labels[name])


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
    return list(dict.fromkeys(notes))
