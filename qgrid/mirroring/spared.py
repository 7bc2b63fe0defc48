"""The tracking mirror of a running sweep: its failures cost one line, never a result."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qgrid import redact
from qgrid.running.progress import Progress
from qgrid.types import Record, Tracking

if TYPE_CHECKING:
    from qgrid.mirroring import tracking


class Mirror:
    """Mirrors records, one at a time; after its first failure no more."""

    def __init__(self, wanted: Tracking, folder: Path, progress: Progress) -> None:
        self._wanted = wanted
        self._folder = folder
        self._progress = progress
        self._mirror: tracking.Mirror | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin, so that it is ready when the first cell is done."""
        with self._spared():
            from qgrid.mirroring import tracking

            store = self._folder.parents[1]
            self._mirror = tracking.start(self._wanted, self._folder.name, store)

    def log(self, record: Record) -> None:
        """Mirror one record."""
        with self._lock:
            if self._mirror is not None:
                with self._spared():
                    self._mirror.log(record)

    def close(self) -> None:
        """Bring it to its end."""
        if self._mirror is not None:
            with self._spared():
                self._mirror.close()

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        """Let no fault of the mirror out of the block."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a mirror never costs a result
            self._mirror = None
            reason = redact.text(f"{type(error).__name__}: {error}")
            self._progress.line(f"tracking is off for the rest of this run: {reason}")
