"""Requests to a real server that answers well, or fails in one of the ways that servers have."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from qgrid.contracts import Endpoint
from qgrid.serving import events, transport
from qgrid.serving.failures import RequestFailed, refusal, seconds_to_wait
from qgrid.serving.transport import Chunk
from tests.serving import stub as stubs
from tests.serving.stub import KEY, Behaviour, Clock, Stub, event, sends, status, token, usage

BODY: dict[str, Any] = {"model": "stub", "prompt": [5, 6, 7], "max_tokens": 4, "stream": True}
DEEP = b"[" * 100_000
WHOLE = (event(token()), event(token(finish="length")), event(usage(3, 2)), event(b"[DONE]"))


async def streamed(
    endpoint: Endpoint, deadline: float = 5.0, stall: float | None = None, requests: int = 1
) -> list[Chunk]:
    chunks = []
    async with transport.session(endpoint, 4) as session:
        for _ in range(requests):
            opened = transport.stream(session, endpoint, "/completions", BODY, deadline, stall)
            async with aclosing(opened) as found:
                chunks += [chunk async for chunk in found]
                assert all(chunk.data for chunk in chunks)
    return chunks


async def posted(endpoint: Endpoint, deadline: float = 5.0) -> dict[str, Any]:
    async with transport.session(endpoint, 1) as session:
        return await transport.post(session, endpoint, "/completions", BODY, deadline)


def failure(
    behaviour: Behaviour, deadline: float = 5.0, stall: float | None = None
) -> RequestFailed:
    with Stub(behaviour) as server, pytest.raises(RequestFailed) as raised:
        asyncio.run(streamed(server.endpoint, deadline, stall))
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)
    return raised.value


def test_events_arrive_one_by_one_when_they_are_sent() -> None:
    """`perf_counter` is one clock here and in the server: arrival is never before, and close."""
    with Stub(Clock(step=0.03)) as server:
        chunks = asyncio.run(streamed(server.endpoint))
    sent = [chunk.data["moment"] for chunk in chunks[:4]]
    late = [chunk.moment - moment for chunk, moment in zip(chunks, sent, strict=False)]
    assert len(chunks) == 4
    assert min(late) >= 0
    assert sorted(late)[1] < 0.015  # not all of them: the machine may be busy
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "gzip" not in server.headers[0]["Accept-Encoding"]


def test_connections_are_kept_between_requests() -> None:
    with Stub(sends(*WHOLE)) as server:
        asyncio.run(streamed(server.endpoint, requests=5))
        assert len(server.bodies) == 5
        assert len(server.connections) == 1


def test_a_connection_sends_small_packets_at_once() -> None:
    async def no_delay() -> int:
        url = f"{server.endpoint.base_url}/completions"
        async with (
            transport.session(server.endpoint, 1) as session,
            session.post(url, json=BODY) as response,
        ):
            assert response.connection is not None
            assert response.connection.transport is not None
            raw = response.connection.transport.get_extra_info("socket")
            return int(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    with Stub(Clock()) as server:
        assert asyncio.run(no_delay()) == 1


def test_json_answers() -> None:
    async def models() -> dict[str, Any]:
        async with transport.session(server.endpoint, 1) as session:
            return await transport.get(session, server.endpoint, "/models", 5.0)

    with Stub(status(200, {"choices": [{"text": "x"}]})) as server:
        assert asyncio.run(posted(server.endpoint)) == {"choices": [{"text": "x"}]}
        assert asyncio.run(models()) == {"data": [{"id": "stub"}]}


@pytest.mark.parametrize(
    ("behaviour", "kind", "says", "retryable"),
    [
        (
            status(500, {"error": {"message": "out of luck"}}),
            "status",
            "HTTP 500: out of luck",
            True,
        ),
        (status(404, {"detail": "no such model"}), "status", "HTTP 404: no such model", False),
        (status(401, {"error": f"bad key {KEY}"}), "status", r"bad key \[redacted\]", False),
        (status(302, Location="http://127.0.0.1:1/"), "status", "HTTP 302", False),
        (sends(event(token()), ends="cut"), "reset", "ended", True),
        (sends(event(token())), "reset", "ended before it was finished", True),
        (sends(event(token()), b'data: {"cho'), "garbage", "no JSON object", True),
        (sends(event(token()), b"<html>\n\n"), "garbage", "'<html>'", True),
        (sends(b"\xff\xfe\x00\n\n"), "garbage", "the stream holds the line", True),
        (sends(event(b"[1, 2]"), *WHOLE), "garbage", "no JSON object: '\\[1, 2\\]'", True),
        (sends(event(b'{"choices":' + DEEP)), "garbage", "no JSON object", True),
        (sends(event(b'{"error":' + DEEP)), "garbage", "no JSON object", True),
        (sends(event({"choices": 5})), "reset", "ended before it was finished", True),
        (sends(event(b'{"error": "\\ud800 half"}')), "status", r": \? half", True),
        (sends(event(b"[DONE]")), "garbage", "held nothing", True),
        (sends(), "garbage", "held nothing", True),
        (sends(b"<html>", content_type="text/html"), "garbage", "`text/html` came", False),
        (
            sends(b'{"error": {"message": "busy", "code": 503}}', content_type="application/json"),
            "status",
            "holds an error: busy",
            True,
        ),
        (
            sends(event(token()), event({"error": {"message": "cache full", "code": 400}})),
            "status",
            "holds an error: cache full",
            False,
        ),
        (sends(event({"object": "error", "message": "old style"})), "status", "old style", True),
    ],
)
def test_each_failure_is_told_apart(
    behaviour: Behaviour, kind: str, says: str, retryable: bool
) -> None:
    found = failure(behaviour)
    assert (found.kind, found.retryable) == (kind, retryable)
    assert re.search(says, str(found))


def test_the_status_of_a_failure_is_kept() -> None:
    assert failure(status(429, {}, Retry_After="7")).retry_after == 7.0
    assert failure(status(429, {})).status == 429
    inside = sends(event({"error": {"message": "x", "code": 500}}))
    assert failure(inside).status == 500


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "x")
        with pytest.raises(RequestFailed) as raised:
            asyncio.run(streamed(endpoint))
    assert raised.value.kind == "refused"
    with pytest.raises(RequestFailed, match="POST nonsense/completions: not a URL"):
        asyncio.run(streamed(Endpoint("nonsense", "x")))


@pytest.mark.parametrize(
    ("behaviour", "stall", "says"),
    [
        (stubs.mute(), None, "deadline has passed"),
        (sends(event(token()), ends="stalls"), None, "deadline has passed"),
        (Clock(step=0.1, tokens=50), None, "deadline has passed"),
        (sends(event(token()), ends="stalls"), 0.1, "stood still"),
    ],
)
def test_nothing_waits_longer_than_it_may(
    behaviour: Behaviour, stall: float | None, says: str
) -> None:
    begin = time.perf_counter()
    found = failure(behaviour, deadline=0.5, stall=stall)
    assert found.kind == "timeout"
    assert says in str(found)
    assert time.perf_counter() - begin < 10  # the server would take 60


def test_a_slow_first_token_is_no_stall() -> None:
    with Stub(Clock(prefill=0.4)) as server:
        assert len(asyncio.run(streamed(server.endpoint, stall=0.2))) == 4


def test_a_stream_may_end_without_done_and_stay_open_after_it() -> None:
    with Stub(sends(event(token()), event(token(finish="stop")))) as server:
        assert len(asyncio.run(streamed(server.endpoint))) == 2
    for ends in ("stalls", "cut"):
        with Stub(sends(*WHOLE, ends=ends)) as server:
            assert len(asyncio.run(streamed(server.endpoint))) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_in_pieces_of_any_size(size: int) -> None:
    text = (
        b': a comment\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\n\n\nid: 7\n'
        b"retry: 5\n\ndata: \xc3\xa9\n\ndata: [DONE]\n\n"
    )
    decoder, found = events.Events(), []
    for begin in range(0, len(text), size):
        found += decoder.feed(text[begin : begin + size])
    assert found == [b'{"a": 1}', b"two\nlines", "é".encode(), b"[DONE]"]


def test_an_event_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_EVENT", 1000)
    for piece in (b"data: " + b"x" * 300, b"data: " + b"x" * 300 + b"\n"):
        decoder = events.Events()
        with pytest.raises(events.NotEvents, match="more than 1000 bytes"):
            for _ in range(5):
                decoder.feed(piece)


@pytest.mark.parametrize("limit", ["MOST_STREAM", "MOST_BODY"])
def test_answers_are_bounded(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(transport, limit, 100)
    ask: Callable[[Endpoint], Any] = streamed if limit == "MOST_STREAM" else posted
    behaviour = (
        Clock(tokens=50, step=0) if limit == "MOST_STREAM" else status(200, {"x": "y" * 999})
    )
    with Stub(behaviour) as server, pytest.raises(RequestFailed, match="more than 100 bytes"):
        asyncio.run(ask(server.endpoint))


def test_the_key_stays_with_its_own_server() -> None:
    async def look(endpoint: Endpoint, url: str) -> str:
        async with transport.session(endpoint, 1) as session:
            return await transport.text(session, endpoint, url, 5.0)

    with Stub(Clock(), metrics="a 1\n") as server, Stub(Clock(), metrics="b 2\n") as other:
        assert server.endpoint.metrics is not None
        assert other.endpoint.metrics is not None
        assert asyncio.run(look(server.endpoint, server.endpoint.metrics)) == "a 1\n"
        assert asyncio.run(look(server.endpoint, other.endpoint.metrics)) == "b 2\n"
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert "Authorization" not in other.headers[0]
        assert KEY not in repr(replace(server.endpoint))


@pytest.mark.parametrize("said", [b"x: %s\n\n", b"data: [%s]\n\n", b'data: {"error": "%s"}\n\n'])
def test_a_key_without_a_known_form_is_in_no_message(said: bytes) -> None:
    key = "open sesame"
    with (
        Stub(sends(said % (b"." * 50 + key.encode()))) as server,
        pytest.raises(RequestFailed, match=r"\.\[redacted\]") as raised,
    ):
        asyncio.run(streamed(replace(server.endpoint, key=key)))
    assert "open" not in str(raised.value)


def test_an_error_that_nests_endlessly_is_shown_as_it_came() -> None:
    found = refusal("POST x", 500, {}, DEEP, None)
    assert (found.kind, found.status) == ("status", 500)
    assert str(found).startswith("POST x: HTTP 500: [[[")


def test_when_to_come_back() -> None:
    assert seconds_to_wait("2.5") == 2.5
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    found = seconds_to_wait(date)
    assert found is not None
    assert 25 < found <= 30
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [seconds_to_wait(value) for value in (None, "soon", "-1", "nan", "inf")] == [None] * 5
