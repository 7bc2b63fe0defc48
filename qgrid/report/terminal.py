"""The sheet on a terminal: one table where it fits, else several with the same first columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qgrid.report.sheet import Column, Section, Sheet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"": "", "fell": "bold red", "faint": "dim", "bad": "red"}
_LONGEST_LABEL = 28
_TITLES: dict[Section, str] = {
    "size": "size and memory",
    "speed": "speed",
    "quality": "quality against the baseline",
    "": "cells",
}


def show(sheet: Sheet, console: Console) -> None:
    """Print the sheet and its notes; no line is wider than the console."""
    from rich.text import Text

    for columns in layout(sheet, console):
        console.print(_table(sheet, columns))
    for mark, sentence in sheet.notes:
        console.print(Text(f"{mark} {sentence}", style="dim"))


def layout(sheet: Sheet, console: Console) -> list[list[int]]:
    """Columns of each table, by index.

    Everything in one table; else size, speed and status in one and quality in another; a part
    that is still too wide goes on in a further table.
    """
    everything = list(range(len(sheet.columns)))
    if _fits(sheet, everything, console):
        return [everything]
    axes, status = _leading(sheet.columns), everything[-1]
    figures = _of(sheet.columns, "size", "speed")
    return [
        [*axes, *part]
        for section in ([*figures, status], _of(sheet.columns, "quality"))
        for part in _packed(sheet, axes, section, console)
    ]


def _packed(
    sheet: Sheet, axes: Sequence[int], columns: Sequence[int], console: Console
) -> Iterator[list[int]]:
    part: list[int] = []
    for column in columns:
        if part and not _fits(sheet, [*axes, *part, column], console):
            yield part
            part = []
        part.append(column)
    if part:
        yield part


def _leading(columns: Sequence[Column]) -> list[int]:
    """The axes: the columns before the first that belongs to a section."""
    first = next((i for i, column in enumerate(columns) if column.section), len(columns) - 1)
    return list(range(first))


def _of(columns: Sequence[Column], *sections: Section) -> list[int]:
    return [i for i, column in enumerate(columns) if column.section in sections]


def _fits(sheet: Sheet, columns: Sequence[int], console: Console) -> bool:
    return console.measure(_table(sheet, columns)).maximum <= console.width


def _table(sheet: Sheet, columns: Sequence[int]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sections = dict.fromkeys(sheet.columns[i].section for i in columns if sheet.columns[i].section)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=" / ".join(_TITLES[section] for section in sections) or _TITLES[""],
        title_justify="left",
        title_style="bold",
    )
    for i in columns:
        column = sheet.columns[i]
        table.add_column(
            Text("\n".join(column.head)),
            justify="right" if column.is_number else "left",
            vertical="bottom",
            no_wrap=True,
            overflow="ellipsis",
            max_width=_LONGEST_LABEL,
        )
    for group in sheet.groups:
        for row in group:
            table.add_row(*(Text(_line(row[i].text), _STYLES[row[i].tone]) for i in columns))
        table.add_section()
    return table


def _line(text: str) -> str:
    """One printable line: what a record says must not move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
