"""Why a request gave no answer, as one exception whose message never holds the key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from qgrid import redact

Kind = Literal["status", "timeout", "reset", "garbage", "refused"]

RETRYABLE_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a character, perhaps without the other one
_MOST_TEXT = 300  # characters of a server's own words in a message


class RequestFailed(Exception):
    """One request that gave no usable answer; the message is one sentence.

    `kind`: `status` (the server said no, also inside a stream that began well), `timeout` (the
    deadline, or a stream that stood still), `reset` (the connection or the stream ended early),
    `garbage` (an answer that is none), `refused` (no connection). `retry_after` in seconds, where
    the server named it.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        status: int | None = None,
        retryable: bool = True,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.retryable = retryable
        self.retry_after = retry_after


def refusal(
    where: str, status: int, headers: Mapping[str, str], body: bytes, key: str | None
) -> RequestFailed:
    """The failure that an HTTP status other than 200 is."""
    said = clean(_said(body), key)
    return RequestFailed(
        "status",
        f"{where}: HTTP {status}" + (f": {said}" if said else ""),
        status=status,
        retryable=status in RETRYABLE_STATUS,
        retry_after=seconds_to_wait(headers.get("Retry-After")),
    )


def complaint(where: str, answer: Mapping[str, Any], key: str | None) -> RequestFailed | None:
    """The failure that an error object in an answer of status 200 is; None if there is none."""
    error = answer.get("error")
    if error is None and answer.get("object") == "error":
        error = answer
    if error is None:
        return None
    code = error.get("code") if isinstance(error, Mapping) else None
    status = code if isinstance(code, int) and not isinstance(code, bool) else None
    return RequestFailed(
        "status",
        f"{where}: the answer holds an error: {clean(_words(error), key)}",
        status=status,
        retryable=status is None or status in RETRYABLE_STATUS,
    )


def seconds_to_wait(value: str | None) -> float | None:
    """`Retry-After` as seconds from now: a number, or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return _until(value)
    return seconds if 0 <= seconds < float("inf") else None


def _until(date: str) -> float | None:
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def clean(text: str, key: str | None) -> str:
    """A server's words on one line, short, without the key or another secret."""
    if key:
        text = text.replace(key, redact.MARK)
    line = " ".join(redact.text(text).split())
    return line if len(line) <= _MOST_TEXT else line[:_MOST_TEXT] + " ..."


def loaded(raw: bytes) -> Any:
    """What JSON says, in characters that UTF-8 has; None where it is none, or nests endlessly."""
    try:
        found = json.loads(raw)
        if _HALF.search(raw):
            found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return found


def _said(body: bytes) -> str:
    """The message of an error answer, or its first words where it is no JSON."""
    answer = loaded(body)
    if answer is None:
        return body.decode(errors="replace")
    return _words(answer.get("error", answer) if isinstance(answer, Mapping) else answer)


def _words(error: Any) -> str:
    if isinstance(error, Mapping):
        error = error.get("message", error.get("detail", dict(error)))
    return error if isinstance(error, str) else json.dumps(error)
