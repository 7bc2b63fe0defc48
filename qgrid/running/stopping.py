"""Ending a sweep from outside: one flag that wakes every thread, whatever it waits for."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the sweep to end; raised in the main thread."""


class Stopped(BaseException):
    """The sweep was told to end: no fault of a cell, so no `except Exception` may take it."""


class Stop:
    """A flag that can be selected on: its descriptor is readable once it is set."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.reason: str | None = None

    def __del__(self) -> None:
        for descriptor in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def fileno(self) -> int:
        """For a selector."""
        return self._read

    def set(self, reason: str) -> None:
        """Tell everybody; the first reason counts."""
        if self.reason is None:
            self.reason = reason
            os.write(self._write, b".")

    def check(self) -> None:
        """Raise if it is set.

        Raises:
            Stopped: with the reason.
        """
        if self.reason is not None:
            raise Stopped(self.reason)


def interrupt(number: int, _: FrameType | None) -> NoReturn:
    """Answer to a signal: end the sweep."""
    raise Interrupted(signal.Signals(number).name)


@contextlib.contextmanager
def deferred(stop: Stop) -> Iterator[list[str]]:
    """Let what would interrupt the main thread set the flag instead; the reasons, if any.

    An exception at any line would leave threads behind that nobody waits for.
    """
    reasons: list[str] = []
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGUSR1)}

    def answer(number: int, frame: FrameType | None) -> None:
        earlier = before[signal.Signals(number)]
        assert callable(earlier)
        try:
            earlier(number, frame)
        except KeyboardInterrupt as interrupted:
            reasons.append(str(interrupted) or signal.Signals(number).name)
            stop.set(reasons[0])

    with on_signal(answer, tuple(number for number in before if callable(before[number]))):
        yield reasons


@contextlib.contextmanager
def on_signal(
    answer: Callable[[int, FrameType | None], Any] | signal.Handlers,
    numbers: tuple[signal.Signals, ...] = _SIGNALS,
) -> Iterator[None]:
    """Answer Ctrl-C and its kin by `answer` inside the block (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, answer) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def undisturbed() -> contextlib.AbstractContextManager[None]:
    """While a sweep ends: a second Ctrl-C must not cut that short."""
    return on_signal(signal.SIG_IGN, (*_SIGNALS, signal.SIGUSR1))
