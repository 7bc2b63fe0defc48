"""What a long command prints: one moving line on a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

PLAIN_SECONDS = 15.0  # in a log, a step that goes on is told again after so long


class Screen:
    """Lines that stay, and steps that the next step or line replaces."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._begin = time.monotonic()
        self._step = ""
        self._told = 0.0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._write(f"{self._clear()}{line}\n")

    def step(self, what: str, count: str = "") -> None:
        """What is being done now, and how far it is."""
        now = time.monotonic()
        text = f"{what}{f' {count}' if count else ''} ... {now - self._begin:.0f} s"
        if self._stream.isatty():
            self._write(f"{self._clear()}{text}")
        elif what != self._step or now - self._told >= PLAIN_SECONDS:
            self._told = now
            self._write(f"{text}\n")
        self._step = what

    def _clear(self) -> str:
        return "\r\x1b[K" if self._stream.isatty() else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
