"""One request of a load as it was timed, from a server or from an engine in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_PLACES = 6  # of seconds in a file: microseconds


@dataclass(frozen=True)
class Sample:
    """Raw times of one request, in seconds since its repeat began.

    `arrivals` are the moments at which tokens came; where one of them brought several,
    `output_tokens` is more than their number.
    """

    load: str  # "concurrency=8", "rate=2"
    repeat: int
    number: int  # of the request within its repeat
    scheduled: float | None  # open loop: when it should have been sent
    sent: float
    arrivals: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    counted: bool  # by the one who made them; else tokens are arrivals
    cached_tokens: int = 0  # of the prompt, that the server had already
    kind: str | None = None  # of the failure
    error: str | None = None  # one sentence

    @property
    def origin(self) -> float:
        """Where latency begins: what a late sender adds must not be lost (coordinated omission)."""
        return self.sent if self.scheduled is None else self.scheduled

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.origin

    @property
    def latency(self) -> float:
        """Seconds to the last token."""
        return self.arrivals[-1] - self.origin

    @property
    def tpot(self) -> float | None:
        """Mean seconds a token after the first; None where there is none."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring arrivals."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [later - earlier for earlier, later in pairs]

    def plain(self) -> Mapping[str, Any]:
        """The fields for a line of JSON, times in microseconds' precision."""
        rounded = {
            "scheduled": None if self.scheduled is None else round(self.scheduled, _PLACES),
            "sent": round(self.sent, _PLACES),
            "arrivals": [round(moment, _PLACES) for moment in self.arrivals],
        }
        return {**asdict(self), **rounded}
