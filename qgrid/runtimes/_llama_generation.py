"""Greedy generation with llama.cpp by continuous batching.

Every pass computes one token of each running request, and as much of the prompts of the others as
fits beside them. A request that ends frees its place for the next one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qgrid.contracts import Generation
from qgrid.gguf import log
from qgrid.runtimes._llama_model import Context
from qgrid.runtimes._llama_pieces import Piece

if TYPE_CHECKING:
    from qgrid.runtimes._llama_model import Rows


@dataclass
class _Request:
    """A prompt on its way: `read` tokens of it are in the cache; the new ones and their times."""

    index: int
    prompt: Sequence[int]
    read: int = 0
    ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def next(self, room: int) -> tuple[Sequence[int], int, int]:
        """What the next pass computes: tokens, their position, and whether (1) a row is wanted."""
        if self.ids:
            return self.ids[-1:], len(self.prompt) + len(self.ids) - 1, 1
        start = self.read
        part = self.prompt[start : start + room]
        self.read += len(part)
        return part, start, int(self.read == len(self.prompt))


class Batcher:
    """Runs prompts through one context; `places` of them at once."""

    def __init__(
        self, context: Context, places: int, max_new_tokens: int, stop: frozenset[int]
    ) -> None:
        self._context = context
        self._free = list(range(places))
        self._limit = max_new_tokens
        self._stop = stop
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}  # by place
        self._done: list[_Request] = []
        self._begin = 0.0

    def run(self, prompts: Sequence[Sequence[int]]) -> list[Generation]:
        """Continuations in the order of the prompts; times are seconds from this call."""
        self._begin = time.perf_counter()
        with log.captured():
            self._context.clear()
            self._waiting.extend(_Request(i, prompt) for i, prompt in enumerate(prompts))
            while self._waiting or self._running:
                self._admit()
                self._step()
        ordered = sorted(self._done, key=lambda request: request.index)
        return [Generation(tuple(each.ids), tuple(each.seconds)) for each in ordered]

    def _admit(self) -> None:
        """Give the lowest free places to waiting requests."""
        while self._waiting and self._free:
            self._running[self._free.pop(0)] = self._waiting.popleft()
            if len(self._running) > 1:
                self._running = dict(sorted(self._running.items()))

    def _step(self) -> None:
        """One pass; the requests that got a row get a token."""
        pieces = []
        receivers = []
        room = self._context.batch - sum(bool(each.ids) for each in self._running.values())
        for place, request in self._running.items():
            ids, start, rows = request.next(room)
            if not ids:
                continue  # its prompt waits for the next pass
            room -= 0 if request.ids else len(ids)
            pieces.append(Piece(ids, start, (place,), rows))
            if rows:
                receivers.append((place, request))
        self._take(receivers, self._context.decode(pieces))

    def _take(self, receivers: Sequence[tuple[int, _Request]], logits: Rows) -> None:
        tokens = logits.argmax(1).tolist()
        now = time.perf_counter() - self._begin
        for (place, request), token in zip(receivers, tokens, strict=True):
            stopped = token in self._stop
            if not stopped:
                request.ids.append(token)
                request.seconds.append(now)
            if stopped or len(request.ids) == self._limit:
                self._end(place)
        if len(self._free) and not self._waiting:
            self._close_gaps()

    def _end(self, place: int) -> None:
        self._done.append(self._running.pop(place))
        self._context.forget(place)
        self._free = sorted([*self._free, place])

    def _close_gaps(self) -> None:
        """Move requests so that their places follow each other.

        The library computes sequences of successive places in one pass, others one after another.
        """
        while self._running:
            lowest, highest = min(self._running), max(self._running)
            gap = next((p for p in range(lowest, highest) if p not in self._running), None)
            if gap is None:
                return
            self._context.copy(highest, gap)
            self._context.forget(highest)
            self._running[gap] = self._running.pop(highest)
            self._free = sorted([*(p for p in self._free if p != gap), highest])
            self._running = dict(sorted(self._running.items()))
