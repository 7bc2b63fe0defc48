"""A real HTTP server whose tokens come on a known clock, or which fails in one chosen way.

As a program (`python -m tests.serving.stub STEP`) it prints its port and serves the clock.
Every event carries the moment at which it was sent: `time.perf_counter()` is one clock for all
processes of a machine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from qgrid.contracts import Endpoint
from tests.servers.threaded import Threaded

Behaviour = Callable[["Stub", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
KEY = "sk-stub-0123456789abcdef0123"


@dataclass
class Stub(Threaded):
    """`with Stub(behaviour) as stub:` then requests to `stub.endpoint`."""

    behaviour: Behaviour
    port: int = 0
    metrics: str | None = None  # text of `/metrics`
    extra: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    asked_for_metrics: list[float] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)  # client ports
    active: int = 0
    most_active: int = 0

    @property
    def endpoint(self) -> Endpoint:
        base = f"http://127.0.0.1:{self.port}"
        url = None if self.metrics is None else f"{base}/metrics"
        return Endpoint(f"{base}/v1", "stub", self.extra, KEY, url, self.own)

    def prompt(self, ids: Sequence[int]) -> list[int]:
        return list(ids)

    async def serve(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until `__exit__`."""
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", self._handle)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=512)
        await site.start()
        self.port = runner.addresses[0][1]
        if ready is not None:
            ready()
        await self.until_left()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        peer = request.transport.get_extra_info("peername") if request.transport else None
        self.connections.add(peer[1] if peer else 0)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return await self.behaviour(self, request, body)
        finally:
            self.active -= 1

    async def _metrics(self, request: web.Request) -> web.Response:
        self.asked_for_metrics.append(time.perf_counter())
        self.headers.append(dict(request.headers))
        return web.Response(text=self.metrics or "")

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "stub"}]})


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def token(text: str = " a", finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return {"object": "text_completion", "choices": [choice], **more}


def usage(prompt: int, output: int, **more: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, **more}
    return {"object": "text_completion", "choices": [], "usage": counts}


async def opened(
    request: web.Request, content_type: str = "text/event-stream"
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    return response


async def until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))


@dataclass(frozen=True)
class Clock:
    """Token `i` at `prefill + i * step` seconds after the request came: an absolute schedule."""

    prefill: float = 0.02
    step: float = 0.01
    tokens: int | None = None  # other than what is asked for
    at_once: int = 1  # tokens in one event
    counts: bool = True  # tells them at the end
    farewell: bool = False  # an event without text that says why it ended
    done: bool = True
    finish: bool = True

    async def __call__(
        self, stub: Stub, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        begin = time.perf_counter()
        response = await opened(request)
        count = body["max_tokens"] if self.tokens is None else self.tokens
        events = -(-count // self.at_once)
        for i in range(events):
            await until(begin + self.prefill + i * self.step)
            last = i == events - 1 and self.finish and not self.farewell
            data = token(finish="length" if last else None, moment=time.perf_counter())
            await response.write(event(data))
        if self.farewell:
            await response.write(event(token("", "length")))
        if self.counts and "stream_options" in body:
            await response.write(event(usage(len(body["prompt"]), count)))
        if self.done:
            await response.write(event(b"[DONE]"))
        await response.write_eof()
        return response


def status(code: int, said: Any = None, **headers: str) -> Behaviour:
    """Answers with this status only."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def behave(_: Stub, __: web.Request, ___: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(said, status=code, headers=named)

    return behave


def sends(*pieces: bytes, content_type: str = "text/event-stream", ends: str = "well") -> Behaviour:
    """Sends these bytes and then ends well, is cut off (`cut`), or says nothing more (`stalls`)."""

    async def behave(_: Stub, request: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        response = await opened(request, content_type)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.005)
        if ends == "stalls":
            await asyncio.sleep(60)
        if ends == "cut":
            assert request.transport is not None
            request.transport.abort()
        else:
            await response.write_eof()
        return response

    return behave


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Each request the next of these, the last for all that follow."""
    left = list(behaviours)

    async def behave(stub: Stub, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        chosen = left.pop(0) if len(left) > 1 else left[0]
        return await chosen(stub, request, body)

    return behave


def one_at_a_time(clock: Clock) -> Behaviour:
    """A queue: the next request begins when the one before is over."""
    lock = asyncio.Lock()

    async def behave(stub: Stub, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        async with lock:
            return await clock(stub, request, body)

    return behave


def mute() -> Behaviour:
    """Takes the request and never answers."""

    async def behave(_: Stub, __: web.Request, ___: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    return behave


if __name__ == "__main__":
    stub = Stub(replace(Clock(), step=float(sys.argv[1]), prefill=2 * float(sys.argv[1])))
    asyncio.run(stub.serve(lambda: print(stub.port, flush=True)))
