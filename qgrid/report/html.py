"""One self-contained page: the table, the surprises, the plot, where the numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from typing import Any

from qgrid.report import axes, load_plot, load_table, parallel
from qgrid.report.columns import Column, Text
from qgrid.report.rows import Row
from qgrid.report.sheet import Sheet
from qgrid.report.style import CSS
from qgrid.types import Check

_SECTIONS = {
    "": "",
    "size": "Size and memory",
    "speed": "Speed",
    "quality": "Quality against the 16-bit baseline",
}
_CODE = re.compile(r"`([^`]*)`")
_MOST_VALUES = 4  # of one provenance key, listed


def render(name: str, sheet: Sheet, surprises: Sequence[str]) -> str:
    """The page as text. Whatever a record says is escaped; nothing is loaded from a network."""
    sheet = _status_first(sheet)
    plot = parallel.render(sheet.rows)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">{escape(_counted(sheet.rows))}</p>',
        _surprises(surprises),
        f'<h2>Results</h2><div class="scroll">{_table(sheet)}</div>{_noted(sheet.notes)}',
        _plot(plot),
        _loads(sheet.rows, has_library=bool(plot)),
        f"<h2>Provenance</h2>{_provenance(sheet.rows)}",
        f"<h2>Cells</h2>{_cells(sheet.rows)}",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>qgrid: {escape(name)}</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _status_first(sheet: Sheet) -> Sheet:
    """The status beside the axes, where a wide table shows it without scrolling."""
    last = len(sheet.columns) - 1
    axes = [i for i in range(last) if not sheet.columns[i].section]
    order = [*axes, last, *range(len(axes), last)]
    groups = tuple(tuple(tuple(row[i] for i in order) for row in group) for group in sheet.groups)
    return replace(sheet, columns=tuple(sheet.columns[i] for i in order), groups=groups)


def _prose(sentence: str) -> str:
    """A sentence with what stands in backticks as code."""
    return _CODE.sub(r"<code>\1</code>", escape(sentence))


def _counted(every: Sequence[Row]) -> str:
    counts: dict[str, int] = {}
    for row in every:
        counts[row.status] = counts.get(row.status, 0) + 1
    listed = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{len(every)} cells: {listed}." if every else "The sweep has no cells."


def _surprises(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{_prose(sentence)}</li>" for sentence in sentences)
    return f'<section class="surprises"><h2>Surprises</h2><ul>{items}</ul></section>'


def _table(sheet: Sheet) -> str:
    bodies = []
    for group in sheet.groups:
        lines = [_line(sheet, row, "base" if i == 0 else "") for i, row in enumerate(group)]
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return f'<table class="results"><thead>{_heads(sheet)}</thead>{"".join(bodies)}</table>'


def _heads(sheet: Sheet) -> str:
    spans = [
        (section, len(list(same))) for section, same in groupby(c.section for c in sheet.columns)
    ]
    top = "".join(
        f'<th colspan="{span}" class="{"band" if section else ""}">{_SECTIONS[section]}</th>'
        for section, span in spans
    )
    heads = "".join(
        f'<th title="{escape(column.title)}" class="{"number" if column.is_number else ""}">'
        f"{'<br>'.join(escape(line) for line in column.head)}</th>"
        for column in sheet.columns
    )
    return f"<tr>{top}</tr><tr>{heads}</tr>"


def _line(sheet: Sheet, row: Sequence[Text], kind: str) -> str:
    cells = map(_place, sheet.columns, row)
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _place(column: Column, text: Text) -> str:
    return _td("number " if column.is_number else "", text)


def _td(kind: str, text: Text) -> str:
    tail = f' <span class="tail">{escape(text.tail)}</span>' if text.tail else ""
    return (
        f'<td class="{kind}{text.tone}" title="{escape(text.hint)}">{escape(text.text)}{tail}</td>'
    )


def _noted(notes: Sequence[tuple[str, str]]) -> str:
    """Marks and what they mean."""
    items = "".join(
        f"<dt>{escape(mark)}</dt><dd>{_prose(sentence)}</dd>" for mark, sentence in notes
    )
    return f'<dl class="notes">{items}</dl>' if items else ""


def _plot(plot: str) -> str:
    if not plot:
        return ""
    return (
        "<h2>Trade-offs</h2><p>A line is a measured cell; green is near its baseline, red far from"
        " it. Drag along an axis to select, drag a title to move its axis.</p>"
        f'<div class="plot">{plot}</div>'
    )


def _loads(every: Sequence[Row], has_library: bool) -> str:
    """The curves of cells that were measured at several loads, and all their figures."""
    table = load_table.build(every)
    if table is None:
        return ""
    plot = load_plot.render(every, with_library=not has_library)
    heads = "".join(
        f'<th title="{escape(title)}" class="{"number" if i else ""}">{escape(head)}</th>'
        for i, (head, title) in enumerate(list(zip(table.heads, table.titles, strict=True))[1:])
    )
    bodies = "".join(f"<tbody>{_load_group(group)}</tbody>" for group in table.groups)
    body = f'<table class="results"><thead><tr>{heads}</tr></thead>{bodies}</table>'
    return (
        "<h2>Loads</h2><p>A point is a number of users at once; further right is more throughput, "
        "further down is less waiting.</p>"
        + (f'<div class="plot">{plot}</div>' if plot else "")
        + f'<div class="scroll loads">{body}</div>{_noted(table.notes)}'
    )


def _load_group(lines: Sequence[Sequence[Text]]) -> str:
    """The cell's name over its loads: beside each of them it would fill half the width."""
    name = lines[0][0]
    kinds = ["", *["number "] * (len(lines[0]) - 2)]
    title = f'<td class="cell" colspan="{len(kinds)}" title="{escape(name.hint)}">'
    body = "".join(f"<tr>{''.join(map(_td, kinds, line[1:]))}</tr>" for line in lines)
    return f"<tr>{title}{escape(name.text)}</td></tr>{body}"


def _provenance(every: Sequence[Row]) -> str:
    """Every key of the environments, with the one value or the few that cells had."""
    values: dict[str, dict[str, None]] = {}
    for row in every:
        environment = {} if row.record is None else row.record.environment
        for key, value in axes.flat(environment).items():
            values.setdefault(key, {})[str(value)] = None
    lines = [(key, _several(list(known))) for key, known in values.items()]
    if not lines:
        return "<p>No cell has a record yet.</p>"
    return _folded("Machine, versions, settings", _pairs(lines))


def _several(values: Sequence[str]) -> str:
    shown = "; ".join(values[:_MOST_VALUES])
    rest = len(values) - _MOST_VALUES
    return f"{shown}; and {rest} more" if rest > 0 else shown


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _pairs(lines: Iterable[tuple[str, str]]) -> str:
    rows = [f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in lines]
    return f'<table class="pairs">{"".join(rows)}</table>'


def _cells(every: Sequence[Row]) -> str:
    return "".join(_folded(_title(row), _story(row)) for row in every)


def _title(row: Row) -> str:
    identity = escape(row.planned.cell_id)
    return f"<code>{identity}</code> {escape(row.name)}: {escape(row.status)}"


def _story(row: Row) -> str:
    """Identities, checks, what was observed and how long it took."""
    lines: list[tuple[str, str]] = [
        ("artifact", row.planned.artifact_id),
        ("quality", row.planned.quality_id),
        ("baseline", row.planned.baseline_cell_id or "this cell is one"),
    ]
    if row.reason is not None:
        lines.append(("reason", row.reason))
    if row.record is not None:
        lines += [(f"check {check.name}", _verdict(check)) for check in row.record.checks]
        lines += _told("observed", row.record.observed) + _told("seconds", row.record.timings)
    return _pairs(lines)


def _told(title: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"{title} {key}", str(value)) for key, value in axes.flat(values).items()]


def _verdict(check: Check) -> str:
    if check.ok:
        return f"ok: {check.actual}"
    return f"failed: expected {check.expected}, found {check.actual}"
