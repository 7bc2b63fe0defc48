"""The threads of a launch and signals: whenever they come, every slot has ended before it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from qgrid.running import crew, stopping
from qgrid.running.pipeline import Pipeline
from qgrid.running.schedule import Queue, Unit
from qgrid.running.slots import Slot
from qgrid.running.stopping import Interrupted, Stop
from tests import faults


class Units:
    """A queue without an end."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def take(self) -> Unit | None:
        self._stop.check()
        return cast("Unit", object())

    def done(self, unit: Unit) -> None:
        pass


class Closing:
    """A pipeline that takes its time to close."""

    def __init__(self, closed: list[str]) -> None:
        self._closed = closed

    def close(self) -> None:
        time.sleep(0.3)
        self._closed.append(threading.current_thread().name)


def work(closed: list[str], perform: Callable[[], object], slots: int = 3) -> None:
    stop = Stop()

    def one(_: Unit, __: Pipeline) -> bool:
        perform()
        time.sleep(0.01)
        return True

    with stopping.on_signal(stopping.interrupt):
        crew.work(
            [Slot()] * slots,
            cast("Queue", Units(stop)),
            lambda _: cast("Pipeline", Closing(closed)),
            one,
            stop,
        )


def tell(numbers: Sequence[signal.Signals]) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGTERM,), (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)],
    ids=["one", "several"],
)
def test_every_slot_has_ended(numbers: Sequence[signal.Signals]) -> None:
    closed: list[str] = []
    timer = threading.Timer(0.1, lambda: tell(numbers))
    timer.start()
    with pytest.raises(Interrupted, match=numbers[0].name):
        work(closed, lambda: None)
    assert len(closed) == 3


def test_a_signal_that_another_thread_takes_is_answered() -> None:
    """As of several at once: the kernel wakes the main thread for the first one alone."""
    closed: list[str] = []

    def take() -> None:
        time.sleep(0.3)  # the main thread waits by now
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"):
        work(closed, take)
    assert len(closed) == 3


def test_a_signal_while_threads_start(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    start = threading.Thread.start

    def started(self: threading.Thread) -> None:
        start(self)
        tell([signal.SIGTERM])

    monkeypatch.setattr(threading.Thread, "start", started)
    with pytest.raises(Interrupted, match="SIGTERM"):
        work(closed, lambda: None)
    assert len(closed) == 3


def test_a_second_signal_does_not_cut_the_end_short() -> None:
    closed: list[str] = []
    timers = [threading.Timer(0.1 * n, lambda: tell([signal.SIGTERM])) for n in range(1, 4)]
    for timer in timers:
        timer.start()
    with pytest.raises(Interrupted, match="SIGTERM"):
        work(closed, lambda: None)
    for timer in timers:
        timer.join(faults.SECONDS)
    assert len(closed) == 3


def test_a_fault_of_a_slot_ends_the_others() -> None:
    closed: list[str] = []

    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        work(closed, fail)
    assert len(closed) == 3


def test_signals_are_answered_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        work([], lambda: tell([signal.SIGTERM]))
    assert signal.getsignal(signal.SIGTERM) is before
