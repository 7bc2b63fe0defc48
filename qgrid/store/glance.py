"""What the first bytes of a record and of a line of a plan tell: enough to count thousands."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD_BYTES = 1024  # schema, ids and status stand first
_SCHEMA = re.compile(r'"schema": ?"([^"]*)"')
_STATUS = re.compile(r'"status": ?"([a-z_]+)"')
_IDS = re.compile(r'\{"cell_id": ?"([0-9a-f]+)", ?"artifact_id": ?"([0-9a-f]+)"')


@dataclass(frozen=True)
class Head:
    """The beginning of a record; `status` is None where it is none that can be read."""

    schema: str | None
    status: str | None
    changed_ns: int  # its file, by the file system's clock


def head(file: Path) -> Head | None:
    """The beginning of a record's file; None: there is none."""
    try:
        with file.open("rb") as opened:
            text = opened.read(HEAD_BYTES).decode(errors="replace")
            changed = file.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    schema, status = _SCHEMA.search(text), _STATUS.search(text)
    return Head(schema[1] if schema else None, status[1] if status else None, changed)


def whole(file: Path) -> dict[str, Any] | None:
    """A record as plain data, not checked; None where it is not there or torn."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def plan_lines(plan_file: Path) -> list[str]:
    """The lines of a plan; a name in it may hold any other sign that ends lines."""
    return [line for line in plan_file.read_text(encoding="utf-8").split("\n") if line]


def planned_ids(plan_file: Path) -> list[tuple[str, str]]:
    """Cell and artifact of each line of a written plan, in order."""
    found = []
    for line in plan_lines(plan_file):
        ids = _IDS.match(line)
        if ids is None:
            try:
                whole_line = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{plan_file} is cut short ({error}); give the grid's command again, which "
                    "writes it anew"
                ) from None
            found.append((str(whole_line["cell_id"]), str(whole_line["artifact_id"])))
        else:
            found.append((ids[1], ids[2]))
    return found
