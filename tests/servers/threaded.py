"""A server of a test that runs in a thread of its own, as long as a `with` block."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self


class Threaded:
    """What extends it has `serve`, which calls `until_left` when it can be asked."""

    _ready: threading.Event | None = None  # None: a program of its own, outside a block

    async def serve(self) -> None:
        """Serve until the block is left."""
        raise AssertionError("a server of a test serves")

    def __enter__(self) -> Self:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def until_left(self) -> None:
        """Say that requests are welcome; return when the block is left."""
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        if self._ready is not None:
            self._ready.set()
        await self._end.wait()
