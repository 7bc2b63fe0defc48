"""Server-sent events, as they come over a connection in pieces of any size. Pure.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6.
"""

from __future__ import annotations

MOST_EVENT = 16 * 2**20  # bytes of one event

_FIELDS = (b"event", b"id", b"retry")


class NotEvents(ValueError):
    """Bytes that no server-sent event holds, or an event without end."""


class Events:
    """`feed` pieces, get the `data` of the events that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that end within `piece`, in order.

        Raises:
            NotEvents: a line that is no field of an event, or an event above `MOST_EVENT` bytes.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = []
        for line in lines:
            if line.startswith(b"data:"):
                self._hold(line)
            elif line in (b"", b"\r"):
                if self._data:
                    found.append(self._taken())
            else:
                _require_field(line)
        if len(self._rest) + self._held > MOST_EVENT:
            raise NotEvents(f"an event of more than {MOST_EVENT} bytes")
        return found

    def finish(self) -> list[bytes]:
        """Data of a last event that its server ended without a blank line."""
        return self.feed(b"\n\n")

    def _hold(self, line: bytes) -> None:
        value = line[5:].rstrip(b"\r").removeprefix(b" ")
        self._data.append(value)
        self._held += len(value)

    def _taken(self) -> bytes:
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data, self._held = [], 0
        return data


def _require_field(line: bytes) -> None:
    """A comment, or a field that says nothing to us."""
    name = line.rstrip(b"\r").partition(b":")[0]
    if name and name not in (*_FIELDS, b"data"):
        raise NotEvents(f"the line {line[:4096].decode(errors='replace')!r}")
