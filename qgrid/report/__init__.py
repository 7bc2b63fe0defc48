"""Records to tables, Markdown, CSV and HTML: pure functions of what is on disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qgrid.files import write_atomic
from qgrid.report import findings, flat, load_table, markdown, sheet
from qgrid.report.findings import surprises
from qgrid.types import PlannedCell, Record

if TYPE_CHECKING:
    from rich.console import Console

LOG_WIDTH = 160  # characters of a table that goes to a file

__all__ = ["rewrite", "show", "surprises", "terminal", "write"]


def write(
    sweep_folder: Path, planned: Sequence[PlannedCell], records: Sequence[Record]
) -> dict[str, Path]:
    """Write `table.md`, `table.csv` and `report.html`, each in one step; their paths by name."""
    from qgrid.report import html

    name = sweep_folder.name
    table = sheet.build(planned, records)
    found = findings.surprises(planned, records)
    texts = {
        "table.md": markdown.render(name, table, found, load_table.build(table.rows)),
        "table.csv": flat.render(planned, records),
        "report.html": html.render(name, table, found),
    }
    for file, text in texts.items():
        write_atomic(sweep_folder / file, text)
    return {file: sweep_folder / file for file in texts}


def terminal(planned: Sequence[PlannedCell], records: Sequence[Record], console: Console) -> None:
    """Print the table, its notes and the surprises."""
    from rich.text import Text

    from qgrid.report import screen

    screen.show(sheet.build(planned, records), console)
    found = findings.surprises(planned, records)
    if found:
        console.print(Text("\nSurprises", style="bold"))
    for sentence in found:
        console.print(Text(f"- {screen.line(sentence)}"))


def rewrite(store: Path, name: str | None) -> int:
    """Write a sweep's tables anew from its records and print them; the exit code.

    Without a name it is the sweep that was planned last.
    """
    from qgrid import sweep
    from qgrid.store import records

    folders = [path.parent for path in (store / "sweeps").glob("*/plan.jsonl")]
    chosen = [folder for folder in folders if name in (None, folder.name)]
    if not chosen:
        asked = "no sweep" if name is None else f"no sweep `{name}`"
        known = ", ".join(sorted(folder.name for folder in folders)) or "none"
        sys.stderr.write(f"qgrid: {asked} in {store / 'sweeps'} (has: {known}); run a grid first\n")
        return 2
    folder = max(chosen, key=lambda each: (each / "plan.jsonl").stat().st_mtime_ns)
    planned = sweep.read_plan(folder / "plan.jsonl")
    show(folder, planned, list(records.read_all(store, planned).values()))
    return 0


def show(folder: Path, planned: Sequence[PlannedCell], found: Sequence[Record]) -> None:
    """Write the tables of a sweep into its folder and print them."""
    from rich.console import Console

    paths = write(folder, planned, found)
    is_sized = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if is_sized else LOG_WIDTH)
    terminal(planned, found, console)
    for path in paths.values():
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
