"""What a reader finds in the table and in the surprises of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qgrid import report
from qgrid.report import sheet
from qgrid.report.columns import Text

if TYPE_CHECKING:
    from tests.report.conftest import Sweep


def shown(sweep: Sweep, method: str, bits: int) -> dict[str, Text]:
    built = sheet.build(sweep.planned, sweep.records)
    heads = [" ".join(column.head) for column in built.columns]
    found = [row for group in built.groups for row in group]
    return next(
        dict(zip(heads, row, strict=True))
        for row in found
        if [text.text for text in row[:2]] == [method, str(bits)]
    )


def marks(sweep: Sweep) -> set[str]:
    return {mark for mark, _ in sheet.build(sweep.planned, sweep.records).notes}


def about(sweep: Sweep, words: str) -> list[str]:
    return [each for each in report.surprises(sweep.planned, sweep.records) if words in each]
