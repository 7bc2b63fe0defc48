"""The sheet and the surprises as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qgrid.report.load_table import Table
from qgrid.report.sheet import Sheet

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!&$])")


def render(name: str, sheet: Sheet, surprises: Sequence[str], loads: Table | None = None) -> str:
    """The whole file; a table a group of comparable cells."""
    heads = [escape(" ".join(column.head)) for column in sheet.columns]
    rules = ["---:" if column.is_number else ":---" for column in sheet.columns]
    lines = [f"# {escape(name)}", ""]
    for group in sheet.groups:
        texts = [[escape(text.whole) for text in row] for row in group]
        lines += [_row(heads), _row(rules), *map(_row, texts), ""]
    lines += [f"{escape(mark)} {escape(sentence)}  " for mark, sentence in sheet.notes]
    if surprises:
        lines += ["", "## Surprises", "", *(f"- {escape(sentence)}" for sentence in surprises)]
    if loads is not None:
        lines += ["", "## Loads", "", *_loads(loads)]
    return "\n".join(lines).rstrip() + "\n"


def _loads(table: Table) -> list[str]:
    rules = [":---", ":---", *["---:"] * (len(table.heads) - 2)]
    lines = [_row([escape(head) for head in table.heads]), _row(rules)]
    for group in table.groups:
        lines += [_row([escape(text.whole) for text in line]) for line in group]
    return [*lines, "", *(f"{escape(mark)} {escape(sentence)}  " for mark, sentence in table.notes)]


def escape(text: str) -> str:
    """Text on one line that Markdown and HTML show as it is."""
    line = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return line.replace("\\<", "&lt;").replace("\\>", "&gt;")


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
