"""Many requests to one server, a few at a time, each with its deadline and its retries."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from qgrid.serving import transport
from qgrid.serving.failures import RequestFailed
from qgrid.serving.retrying import Retries, retrying

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from qgrid.contracts import Endpoint

T = TypeVar("T")
Body = Mapping[str, Any]
COMPLETIONS = "/completions"
_LOST_AFTER = 16  # requests in a row that failed at every attempt


class ServerLost(RuntimeError):
    """The server cannot be reached, or has stopped to answer."""


class Client:
    """Requests to one endpoint. `counts` tells `sent` attempts, `retried` and `failed` requests."""

    def __init__(self, endpoint: Endpoint, deadline: float, retries: int, connections: int) -> None:
        self.endpoint = endpoint
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()  # failed attempts by kind
        self._deadline = deadline
        self._retries = Retries(attempts=retries + 1)
        self._connections = connections
        self._lost_after = max(_LOST_AFTER, 2 * connections)
        self._failed_in_a_row = 0
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._session: ClientSession | None = None

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET of `base_url + path`.

        Raises:
            RequestFailed: there is none after all attempts.
        """
        return self._run(self._got(path))

    def text(self, url: str) -> str:
        """What a GET of `url` gives, asked once.

        Raises:
            RequestFailed: there is nothing.
        """
        return self._run(self._text(url))

    def post(self, path: str, body: Body, base_url: str | None = None) -> dict[str, Any]:
        """The answer to one POST; `base_url`: another address of the same server.

        Raises:
            RequestFailed: there is none after all attempts.
        """
        return self._run(self._posted(path, body, base_url))

    def ask(
        self, bodies: Sequence[Body], read: Callable[[dict[str, Any], int], T]
    ) -> list[T | RequestFailed]:
        """What `read(answer, number)` makes of the completions of all bodies, in their order.

        `read` raises `RequestFailed` for an answer that it cannot use, which is then asked again.

        Raises:
            ServerLost: so many requests in a row failed that the server is gone.
        """
        found = self._run(self._asked(bodies, read))
        if self._is_lost():
            last = next(each for each in reversed(found) if isinstance(each, RequestFailed))
            raise ServerLost(
                f"{self._failed_in_a_row} requests in a row got no answer; the last one: {last}"
            )
        return found

    def close(self) -> None:
        """Close connections and the loop."""
        try:
            self._runner.run(self._stack.aclose())
        finally:
            self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _open(self) -> ClientSession:
        if self._session is None:
            opened = transport.session(self.endpoint, self._connections)
            self._session = await self._stack.enter_async_context(opened)
        return self._session

    async def _got(self, path: str) -> dict[str, Any]:
        session = await self._open()
        return await self._tried(
            lambda: transport.get(session, self.endpoint, path, self._deadline)
        )

    async def _text(self, url: str) -> str:
        return await transport.text(await self._open(), self.endpoint, url, self._deadline)

    async def _posted(self, path: str, body: Body, base_url: str | None) -> dict[str, Any]:
        session = await self._open()
        endpoint = self.endpoint
        if base_url is not None:
            endpoint = replace(endpoint, base_url=base_url)
        return await self._tried(
            lambda: transport.post(session, endpoint, path, body, self._deadline)
        )

    async def _asked(
        self, bodies: Sequence[Body], read: Callable[[dict[str, Any], int], T]
    ) -> list[T | RequestFailed]:
        session = await self._open()
        gate = asyncio.Semaphore(self._connections)
        last: list[RequestFailed] = []

        async def one(number: int, body: Body) -> T | RequestFailed:
            async def attempt() -> T:
                answer = await transport.post(
                    session, self.endpoint, COMPLETIONS, body, self._deadline
                )
                return read(answer, number)

            async with gate:
                if self._is_lost():
                    return last[-1]
                try:
                    found = await self._tried(attempt)
                except RequestFailed as failure:
                    last.append(failure)
                    # an answer such as "too long" is one: only silence and faults count
                    self._failed_in_a_row = self._failed_in_a_row + 1 if failure.retryable else 0
                    return failure
                self._failed_in_a_row = 0
                return found

        return await asyncio.gather(*(one(i, body) for i, body in enumerate(bodies)))

    def _is_lost(self) -> bool:
        return self._failed_in_a_row >= self._lost_after

    async def _tried(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        failures: list[RequestFailed] = []

        async def counted() -> T:
            self.counts["sent"] += 1
            return await attempt()

        def note(failure: RequestFailed) -> None:
            failures.append(failure)
            self.reasons[failure.kind] += 1

        try:
            found = await retrying(counted, self._retries, note)
        except RequestFailed:
            self.counts["failed"] += 1
            self.counts["retried"] += len(failures) > 1
            raise
        self.counts["retried"] += bool(failures)
        return found
