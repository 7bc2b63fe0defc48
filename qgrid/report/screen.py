"""The sheet on a terminal: one table where it fits, else several with the same first columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qgrid.report.columns import Section
from qgrid.report.sheet import Sheet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"": "", "fell": "bold red", "faint": "dim", "bad": "red"}
_LONGEST = 32  # characters of a label
_GAP = 2  # between two columns, and one before the first
_TITLES: dict[Section, str] = {
    "size": "size and memory",
    "speed": "speed",
    "quality": "quality against the baseline",
    "": "status",
}


def show(sheet: Sheet, console: Console) -> None:
    """Print the sheet and its notes; no line of a table is wider than the console."""
    from rich.text import Text

    texts = _texts(sheet)
    for columns in layout(sheet, console.width):
        console.print(_table(sheet, texts, columns))
    for mark, sentence in sheet.notes:
        console.print(Text(f"{mark} {line(sentence)}", style="dim"))


def layout(sheet: Sheet, width: int) -> list[list[int]]:
    """Columns of each table, by index.

    Everything in one table; else size, speed and status in one and quality in another (the status
    beside quality where that saves a table); a part that is still too wide goes on in a further
    table of about the same width.
    """
    widths = _widths(sheet)
    status = len(widths) - 1
    axes = [i for i in range(status) if not sheet.columns[i].section]
    room = width - 1 - sum(widths[i] + _GAP for i in axes)
    if sum(each + _GAP for each in widths[len(axes) :]) <= room:
        return [list(range(len(widths)))]
    figures, scores = _of(sheet, "size", "speed"), _of(sheet, "quality")
    sections = ([*figures, status], scores), (figures, [*scores, status])
    tries = [
        [part for section in each for part in _balanced(section, widths, room)] for each in sections
    ]
    return [[*axes, *part] for part in min(tries, key=len)]


def _of(sheet: Sheet, *sections: Section) -> list[int]:
    return [i for i, column in enumerate(sheet.columns) if column.section in sections]


def _balanced(columns: Sequence[int], widths: Sequence[int], room: int) -> list[list[int]]:
    """As few parts as the room allows, none much narrower than the others."""
    parts = _packed(columns, widths, room)
    while len(parts) > 1:
        narrower = _packed(columns, widths, max(_taken(part, widths) for part in parts) - 1)
        if len(narrower) > len(parts) or narrower == parts:  # one column alone is the widest
            break
        parts = narrower
    return parts


def _packed(columns: Sequence[int], widths: Sequence[int], room: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for column in columns:
        if parts and _taken([*parts[-1], column], widths) <= room:
            parts[-1].append(column)
        else:
            parts.append([column])
    return parts


def _taken(columns: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[i] + _GAP for i in columns)


def _widths(sheet: Sheet) -> list[int]:
    """Characters that each column takes, its head included."""
    from rich.cells import cell_len

    return [
        max(map(cell_len, (*column.head, *texts)))
        for column, texts in zip(sheet.columns, _texts(sheet), strict=True)
    ]


def _texts(sheet: Sheet) -> list[list[str]]:
    """For each column the printed texts of all rows, tails aligned."""
    rows = [row for group in sheet.groups for row in group]
    columns = []
    for i in range(len(sheet.columns)):
        tail = max((len(row[i].tail) for row in rows), default=0)
        texts = (f"{row[i].text} {row[i].tail:{tail}}" if tail else row[i].text for row in rows)
        columns.append([_short(line(text)) for text in texts])
    return columns


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _table(sheet: Sheet, texts: Sequence[Sequence[str]], columns: Sequence[int]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sections = dict.fromkeys(sheet.columns[i].section for i in columns if sheet.columns[i].section)
    title = ", ".join(_TITLES[section] for section in sections or {"": None})
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i in columns:
        head, is_number = sheet.columns[i].head, sheet.columns[i].is_number
        side = "right" if is_number else "left"
        table.add_column(Text("\n".join(head)), justify=side, vertical="bottom", no_wrap=True)  # type: ignore[arg-type]
    number = 0
    for group in sheet.groups:
        for row in group:
            table.add_row(*(Text(texts[i][number], _STYLES[row[i].tone]) for i in columns))
            number += 1
        table.add_section()
    return table


def line(text: str) -> str:
    """One printable line: what a record says must not move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
