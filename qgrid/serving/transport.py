"""One request to an OpenAI-compatible server: a JSON answer, or a stream of server-sent events.

Every way in which it can fail ends as `RequestFailed`, and nothing waits longer than its deadline.
The key goes into a header and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qgrid import redact
from qgrid.serving.connection import headers, named, session, within
from qgrid.serving.events import Events, NotEvents
from qgrid.serving.failures import RequestFailed, clean, complaint, loaded, refusal

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

    from qgrid.contracts import Endpoint

__all__ = ["Chunk", "RequestFailed", "get", "post", "session", "stream", "text"]

MOST_BODY = 512 * 2**20  # bytes of one JSON answer; those with many log-probabilities are long
MOST_STREAM = 256 * 2**20  # bytes of one stream
_MOST_ERROR = 64 * 2**10
_MOST_SHOWN = 2**12  # bytes that a message is cut from: more than it shows, so no half of a key
_FAREWELL_SECONDS = 1.0  # for a server to end a stream after saying that it is done
_DONE = b"[DONE]"


@dataclass(frozen=True)
class Chunk:
    """One event of a stream: when it arrived (`time.perf_counter()`) and what it holds."""

    moment: float
    raw: bytes = field(repr=False)
    where: str = field(default="", repr=False)
    key: str | None = field(default=None, repr=False)  # never to be told

    @cached_property
    def data(self) -> dict[str, Any]:
        """The event as JSON, read when first asked for: not while others are being timed.

        Raises:
            RequestFailed: it is no JSON object.
        """
        return _object(self.where, self.raw, self.key)


async def post(
    session: ClientSession,
    endpoint: Endpoint,
    path: str,
    body: Mapping[str, Any],
    deadline: float,
) -> dict[str, Any]:
    """The JSON answer to a POST to `base_url + path`, within `deadline` seconds.

    Raises:
        RequestFailed: there is none, whatever the reason.
    """
    return await _answer(session, endpoint, "POST", path, body, deadline)


async def get(
    session: ClientSession, endpoint: Endpoint, path: str, deadline: float
) -> dict[str, Any]:
    """The JSON answer to a GET of `base_url + path`, within `deadline` seconds.

    Raises:
        RequestFailed: there is none, whatever the reason.
    """
    return await _answer(session, endpoint, "GET", path, None, deadline)


async def text(session: ClientSession, endpoint: Endpoint, url: str, deadline: float) -> str:
    """What a GET of `url` gives; the key goes along only to the endpoint's own origin.

    Raises:
        RequestFailed: there is none, whatever the reason.
    """
    until = time.perf_counter() + deadline
    where = redact.text(f"GET {url}")
    with named(where, endpoint.key):
        response = await within(
            session.get(url, headers=headers(endpoint, url), allow_redirects=False), until, where
        )
        async with response:
            return (await _body(response, endpoint, until, where)).decode(errors="replace")


async def stream(  # noqa: PLR0913, PLR0917 - one request is that many facts
    session: ClientSession,
    endpoint: Endpoint,
    path: str,
    body: Mapping[str, Any] | bytes,
    deadline: float,
    stall: float | None = None,
) -> AsyncGenerator[Chunk, None]:
    """The events of a streamed answer as they arrive, up to `[DONE]`.

    `body` may be JSON already. `stall`: seconds without anything new after the first event; None:
    only `deadline` counts. Close it (`contextlib.aclosing`) where you stop before its end.

    Raises:
        RequestFailed: no stream, an error in it, or one that ends before it is finished. Events
            that came before were yielded.
    """
    until = time.perf_counter() + deadline
    where = _where(endpoint, path)
    with named(where, endpoint.key):
        response = await within(_send(session, endpoint, "POST", path, body), until, where)
        async with response:
            await _require_stream(response, endpoint, until, where)
            last: list[Chunk] = []
            done = False
            async for moment, data in _arrivals(response, endpoint.key, until, stall, where):
                if data == _DONE:
                    done = True
                    break
                chunk = Chunk(moment, data, where, endpoint.key)
                _require_no_complaint(chunk)
                last = [*last[-1:], chunk]
                yield chunk
            if not done:
                _require_finished(last, where)
            elif not last:
                raise RequestFailed("garbage", f"{where}: the stream held nothing")
            else:
                await _farewell(response)


async def _arrivals(
    response: ClientResponse, key: str | None, until: float, stall: float | None, where: str
) -> AsyncIterator[tuple[float, bytes]]:
    """Moment and data of every event."""
    events, size, begun = Events(), 0, False
    read = response.content.readany
    try:
        while True:
            allowed = until if stall is None or not begun else time.perf_counter() + stall
            piece = await within(read(), min(until, allowed), where, stalled=allowed < until)
            moment = time.perf_counter()
            size += len(piece)
            if size > MOST_STREAM:
                raise NotEvents(f"a stream of more than {MOST_STREAM} bytes")
            for data in events.feed(piece) if piece else events.finish():
                begun = True
                yield moment, data
            if not piece:
                return
    except NotEvents as error:
        raise RequestFailed(
            "garbage", f"{where}: the stream holds {clean(str(error), key)}"
        ) from None


async def _farewell(response: ClientResponse) -> None:
    """Read to the end of the answer, so that its connection can be used again.

    All tokens are there: how the connection ends is no failure of theirs.
    """
    import aiohttp

    try:
        async with asyncio.timeout(_FAREWELL_SECONDS):
            while not response.content.at_eof():
                await response.content.readany()
    except (TimeoutError, aiohttp.ClientError, ConnectionError):
        response.close()


async def _answer(  # noqa: PLR0913, PLR0917 - one request is that many facts
    session: ClientSession,
    endpoint: Endpoint,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    deadline: float,
) -> dict[str, Any]:
    until = time.perf_counter() + deadline
    where = _where(endpoint, path, method)
    with named(where, endpoint.key):
        response = await within(_send(session, endpoint, method, path, body), until, where)
        async with response:
            answer = _object(where, await _body(response, endpoint, until, where), endpoint.key)
    failure = complaint(where, answer, endpoint.key)
    if failure is not None:
        raise failure
    return answer


async def _send(
    session: ClientSession,
    endpoint: Endpoint,
    method: str,
    path: str,
    body: Mapping[str, Any] | bytes | None,
) -> ClientResponse:
    url = endpoint.base_url.rstrip("/") + path
    sent = headers(endpoint, url)
    if body is not None:
        sent["Content-Type"] = "application/json"
    content = json.dumps(body).encode() if isinstance(body, Mapping) else body
    return await session.request(method, url, data=content, headers=sent, allow_redirects=False)


async def _body(response: ClientResponse, endpoint: Endpoint, until: float, where: str) -> bytes:
    """All of an answer of status 200."""
    if response.status != 200:
        raise await _refused(response, endpoint, until, where)
    body = await within(_read(response, MOST_BODY), until, where)
    if len(body) > MOST_BODY:
        raise RequestFailed(
            "garbage", f"{where}: an answer of more than {MOST_BODY} bytes", retryable=False
        )
    return bytes(body)


async def _refused(
    response: ClientResponse, endpoint: Endpoint, until: float, where: str
) -> RequestFailed:
    body = await within(_read(response, _MOST_ERROR), until, where)
    return refusal(where, response.status, response.headers, body, endpoint.key)


async def _read(response: ClientResponse, most: int) -> bytes:
    """At most a little more than `most` bytes."""
    pieces, size = [], 0
    while size <= most:
        piece = await response.content.readany()
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


async def _require_stream(
    response: ClientResponse, endpoint: Endpoint, until: float, where: str
) -> None:
    if response.status != 200:
        raise await _refused(response, endpoint, until, where)
    if response.content_type == "text/event-stream":
        return
    body = await within(_read(response, _MOST_ERROR), until, where)
    if response.content_type == "application/json":
        failure = complaint(where, _object(where, body, endpoint.key), endpoint.key)
        if failure is not None:
            raise failure
    raise RequestFailed(
        "garbage",
        f"{where}: a stream was asked for and `{response.content_type}` came: "
        f"{clean(body.decode(errors='replace'), endpoint.key)}",
        retryable=False,
    )


def _require_no_complaint(chunk: Chunk) -> None:
    """A cheap look first: parsing while others are timed would delay them."""
    if b'"error"' in chunk.raw:
        failure = complaint(chunk.where, chunk.data, chunk.key)
        if failure is not None:
            raise failure


def _require_finished(last: list[Chunk], where: str) -> None:
    """A stream without `[DONE]` is whole if its last events name a reason to end."""
    if not last:
        raise RequestFailed("garbage", f"{where}: the stream held nothing")
    for chunk in last:
        choices = chunk.data.get("choices")
        told = choices if isinstance(choices, list) else ()
        if any(isinstance(each, dict) and each.get("finish_reason") for each in told):
            return
    raise RequestFailed("reset", f"{where}: the stream ended before it was finished")


def _object(where: str, raw: bytes, key: str | None) -> dict[str, Any]:
    found = loaded(raw)
    if not isinstance(found, dict):
        shown = clean(raw[:_MOST_SHOWN].decode(errors="replace"), key)
        raise RequestFailed("garbage", f"{where}: the answer is no JSON object: {shown!r}")
    return found


def _where(endpoint: Endpoint, path: str, method: str = "POST") -> str:
    return redact.text(f"{method} {endpoint.base_url.rstrip('/')}{path}")
