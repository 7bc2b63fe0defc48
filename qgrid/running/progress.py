"""What a running sweep prints: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from qgrid.lora import adapters
from qgrid.report import axes
from qgrid.types import PlannedCell, Record, Stage

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """Stage, cell, count and estimated time left; for any number of threads.

    The only place where a running sweep prints.
    """

    def __init__(self, planned: Sequence[PlannedCell], stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._labels = labels(planned)
        self._total = len(planned)
        self._done = 0
        self._to_run = 0
        self._ran = 0
        self._opened = 0.0
        self._begun: dict[str, float] = {}  # cell id -> when
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def open(self, num_to_run: int) -> None:
        """Begin; on a terminal the bar appears."""
        self._to_run = num_to_run
        self._opened = time.monotonic()
        if self._stream.isatty():
            self._bar = _bar(self._stream)
            self._task = self._bar.add_task("", total=self._total, left="")
            self._bar.start()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def begin(self, planned: PlannedCell) -> None:
        """A cell starts."""
        with self._lock:
            self._begun[planned.cell_id] = time.monotonic()

    def stage(self, planned: PlannedCell, stage: Stage) -> None:
        """A stage of a cell starts."""
        with self._lock:
            text = f"{self.label(planned)}: {stage}"
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, description=text, left=self._left(), refresh=True)
            else:
                self._line(f"[{self._done + 1}/{self._total}] {text} ...")

    def end(self, planned: PlannedCell, record: Record, ran: bool, remark: str = "") -> None:
        """A cell is done; one that did not run now costs no time, and `remark` says why."""
        with self._lock:
            self._done += 1
            if ran:
                self._ran += 1
                seconds = time.monotonic() - self._begun[planned.cell_id]
                remark = f"in {seconds:.1f} s"
            text = f"{record.status:<12} {self.label(planned)} {remark}".rstrip()
            if record.error is not None:
                text += f": {record.error.message}"
            left = self._left() if ran else ""
            self._line(f"[{self._done}/{self._total}] {text}{f' ({left})' if left else ''}")
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=self._done, left=left, refresh=True)

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        with self._lock:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def label(self, planned: PlannedCell) -> str:
        """A cell's name in this sweep; also of one that is only built, or compared with."""
        if planned.cell_id not in self._labels:
            self._labels |= labels([planned])
        return self._labels[planned.cell_id]

    def _left(self) -> str:
        remaining = self._to_run - self._ran
        if self._ran == 0 or remaining <= 0:
            return ""
        each = (time.monotonic() - self._opened) / self._ran
        return f"about {duration(each * remaining)} left"


def labels(planned: Sequence[PlannedCell]) -> dict[str, str]:
    """Names by cell id: model, method and bits, and whatever else differs between the cells."""
    named = axes.labels([each.cell for each in planned])
    return {
        each.cell_id: " ".join(_words(each, label))
        for each, label in zip(planned, named, strict=True)
    }


def _words(planned: PlannedCell, label: Mapping[str, str]) -> Iterator[str]:
    yield label.get("model", adapters.label(planned.cell.model))
    for axis, text in label.items():
        if axis == "bits":
            yield f"{text}-bit"
        elif axis in {"kv_cache", "context", "seed"}:
            yield f"{axis}={text}"
        elif axis != "model" and text != axes.ABSENT:
            yield text


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
    )
    # drawn only when something changes: a clock that ticks would disturb what is being timed
    console = Console(file=stream)
    return Progress(*columns, console=console, transient=True, auto_refresh=False)
