"""How often work has begun and not ended: what the next attempt on another machine must know."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgrid.running.stopping import Stopped
from qgrid.store import leases
from qgrid.types import Failure

FILE = "attempts.jsonl"
TIME_LIMIT = "time limit"
DONE = "done"


@dataclass(frozen=True)
class Earlier:
    """Attempts of one launch that gave no result; `why` the last one ended, where it could say."""

    count: int
    hosts: tuple[str, ...]
    why: str | None

    @property
    def sentence(self) -> str:
        """For the record of work that is given up."""
        where = ", ".join(dict.fromkeys(self.hosts))
        last = "ended without a word (node lost or killed)" if self.why is None else self.why
        return f"{self.count} attempts gave no result (on {where}); the last: {last}"


class Attempts:
    """Counts the attempts of one launch; without a limit nobody counts."""

    def __init__(self, launch: str, limit: int | None) -> None:
        self._launch = launch
        self._limit = limit

    @contextlib.contextmanager
    def counted(self, folder: Path) -> Iterator[None]:
        """Write down an attempt at what has that folder, and why it ends early if it can say."""
        if self._limit is None:
            yield
            return
        begin(folder, self._launch)
        try:
            yield
        except Stopped as stopped:
            ended(folder, self._launch, str(stopped))
            raise
        ended(folder, self._launch, DONE)

    def given_up(self, folder: Path) -> Failure | None:
        """Why there is no further attempt."""
        if self._limit is None:
            return None
        found = earlier(folder, self._launch)
        if found.count < self._limit:
            return None
        return Failure("timeout" if found.why == TIME_LIMIT else "crashed", found.sentence)


def earlier(folder: Path, launch: str) -> Earlier:
    """What is written about a launch in the folder of a cell or a build."""
    lines = [line for line in _lines(folder / FILE) if line.get("launch") == launch]
    done = [number for number, line in enumerate(lines, 1) if line.get("why") == DONE]
    lines = lines[max(done, default=0) :]
    begun = [line for line in lines if "host" in line]
    last = lines[-1] if lines else {}
    return Earlier(len(begun), tuple(str(line["host"]) for line in begun), last.get("why"))


def begin(folder: Path, launch: str) -> None:
    """Write down that an attempt begins here."""
    job = os.environ.get(leases.JOB)
    _append(folder / FILE, {"launch": launch, "host": platform.node(), "job": job})


def ended(folder: Path, launch: str, why: str) -> None:
    """Write down why an attempt ends without a result."""
    _append(folder / FILE, {"launch": launch, "why": why})


def _append(file: Path, line: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" + json.dumps(line) + "\n")  # the line before may have been cut short
        lines.flush()
        os.fsync(lines.fileno())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; one that was cut short says nothing."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            yield found
