"""The sheet and the surprises as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qgrid.report.sheet import Sheet

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!&$])")


def render(name: str, sheet: Sheet, surprises: Sequence[str]) -> str:
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
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Text on one line that Markdown and HTML show as it is."""
    line = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return line.replace("\\<", "&lt;").replace("\\>", "&gt;")


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
