"""A server's own figures beside a run: cache in use and requests in its queue.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text). Servers put
their own word and a colon before the names, which is not looked at.
"""

from __future__ import annotations

import asyncio
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qgrid.serving import transport
from qgrid.serving.failures import RequestFailed
from qgrid.serving.summary import plain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientSession

    from qgrid.contracts import Endpoint
    from qgrid.types import Measurement

PERIOD_SECONDS = 0.5
_FIRST_SECONDS = 0.1  # from the beginning of a run, when all of its first requests are there
_DEADLINE_SECONDS = 2.0
_NAMES = {
    "kv_usage": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "kv_cache_usage_ratio"),
    "queue": ("num_requests_waiting", "requests_deferred", "num_queue_reqs", "queue_size"),
    "running": ("num_requests_running", "requests_processing", "num_running_reqs"),
}
_PEAKS = {"kv_usage": "kv_usage_peak", "queue": "queue_peak"}
_LINE = re.compile(
    rf"^(?:\w*[:_])??({'|'.join(name for names in _NAMES.values() for name in names)})"
    r"(?:\{[^\n]*\})? +(\S+)(?: +\d+)?$",
    re.MULTILINE,
)


def parsed(text: str) -> dict[str, float]:
    """The figures of `_NAMES` that the text holds; those of several engines are added.

    A share is not added: the fullest cache counts.
    """
    found: dict[str, float] = {}
    for name, number in _LINE.findall(text):
        key = next(key for key, names in _NAMES.items() if name in names)
        with suppress(ValueError):
            value = float(number)
            if math.isfinite(value):
                known = found.get(key, 0.0)
                found[key] = max(known, value) if key == "kv_usage" else known + value
    return found


@dataclass
class Gauges:
    """What was seen of each load."""

    seen: dict[str, list[Mapping[str, float]]] = field(default_factory=dict)

    def measurements(self) -> Iterator[Measurement]:
        """The peaks at every load; nothing where the server tells nothing."""
        for load, samples in self.seen.items():
            for key, metric in _PEAKS.items():
                values = _values(samples, key)
                if values:
                    yield plain(metric, max(values), load, len(values))

    def medians(self) -> dict[str, dict[str, float]]:
        """Load -> figure -> median of what was seen."""
        return {
            load: {
                key: statistics.median(values)
                for key in _NAMES
                if (values := _values(samples, key))
            }
            for load, samples in self.seen.items()
        }


def _values(samples: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [each[key] for each in samples if key in each]


class Sampler:
    """Looks at a server's figures while a load runs, at most every `PERIOD_SECONDS`."""

    def __init__(self, session: ClientSession, endpoint: Endpoint) -> None:
        self._session = session
        self._endpoint = endpoint
        self._last = -PERIOD_SECONDS
        self.gauges = Gauges()

    @asynccontextmanager
    async def during(self, load: str) -> AsyncIterator[None]:
        """Sample while the block runs."""
        url = self._endpoint.metrics
        if url is None:
            yield
            return
        task = asyncio.create_task(self._sample(url, load))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _sample(self, url: str, load: str) -> None:
        await asyncio.sleep(_FIRST_SECONDS)
        while True:
            await asyncio.sleep(max(0.0, self._last + PERIOD_SECONDS - time.monotonic()))
            self._last = time.monotonic()
            try:
                said = await transport.text(self._session, self._endpoint, url, _DEADLINE_SECONDS)
            except RequestFailed:
                continue  # one look less; the requests themselves tell what is wrong
            found = parsed(said)
            if found:
                self.gauges.seen.setdefault(load, []).append(found)
