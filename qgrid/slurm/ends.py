"""Tasks that somebody cancelled, told from those that ended by themselves."""

from __future__ import annotations

import time

from qgrid.slurm.client import TaskState
from qgrid.slurm.queue import UNKNOWN, Look


class Ends:
    """Watches the queue from the first look on; `memory_seconds`: Slurm's `MinJobAge`.

    A task that is cancelled before it runs leaves the queue at once and without a trace. One that
    ran is remembered for `MinJobAge`, so that what waited a shorter time ago and is unknown now
    was cancelled.
    """

    def __init__(self, memory_seconds: float, first: Look) -> None:
        self._memory = memory_seconds
        self._ending = _in_state(first, "COMPLETING")  # by whom, is unknown; it was before us
        self._pending = _in_state(first, "PENDING")
        self._at = time.monotonic()
        self._dropped: set[tuple[str, int]] = set()

    def see(self, seen: Look) -> None:
        """Compare with the look before."""
        now = time.monotonic()
        if now - self._at < self._memory:
            self._dropped |= self._pending & _in_state(seen, UNKNOWN)
        self._pending, self._at = _in_state(seen, "PENDING"), now

    def is_cancelled(self, state: TaskState) -> bool:
        """Whether somebody did not want this task, since this launcher looked first."""
        if state.index is None:
            return False
        key = (state.job, state.index)
        if state.state == UNKNOWN:
            return key in self._dropped
        return state.state == "CANCELLED" and key not in self._ending


def _in_state(seen: Look, word: str) -> set[tuple[str, int]]:
    return {(state.job, index) for _, index, state in seen.tasks() if state.state == word}
