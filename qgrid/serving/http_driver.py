"""A load against an OpenAI-compatible server: one event loop, one streamed request a coroutine."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qgrid.serving import answers, transport
from qgrid.serving.failures import RequestFailed
from qgrid.serving.samples import Sample
from qgrid.serving.server_metrics import Sampler
from qgrid.serving.summary import plain

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from qgrid.contracts import Server
    from qgrid.serving.schedule import Run
    from qgrid.serving.transport import Chunk
    from qgrid.types import Measurement, Workload

PATH = "/completions"
STALL_SECONDS = 120.0  # without anything new, after the first token
LATE_SECONDS = 0.01  # after its moment, a request of an open loop counts as sent late
BUSY_PROCESSORS = 0.8  # of the client: from here on it may be what is measured
_SETTLING_SECONDS = 0.001  # to notice the connections that the server closed since the last run
_USAGE = "stream_options"  # asks for counts; not every server knows it
_NOT_UNDERSTOOD = frozenset({400, 422})


@dataclass
class _Raw:
    """One request as it went; read only when the run is over."""

    scheduled: float | None
    sent: float = 0.0
    chunks: list[Chunk] = field(default_factory=list)
    failure: RequestFailed | None = None


class HttpDriver:
    """Sends the requests of runs to a server. A context manager: the connections are its own."""

    def __init__(self, server: Server, workload: Workload) -> None:
        self._server = server
        self._endpoint = server.endpoint
        self._workload = workload
        self._counts = True  # whether the server is asked for counts
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.exact = server.endpoint.own
        self._late = 0
        self._processors: dict[str, list[float]] = {}

    def __enter__(self) -> Self:
        gc.collect()
        if not gc.get_freeze_count():
            self._stack.callback(gc.unfreeze)
        gc.freeze()  # what is there now: collecting between runs need not look at it
        most = max((1, *self._workload.concurrency))
        if self._workload.request_rates:
            most = max(most, self._workload.rate_requests)
        opened = transport.session(self._endpoint, most + 1)  # one for the server's own figures
        self._session: ClientSession = self._runner.run(self._stack.enter_async_context(opened))
        self._sampler = Sampler(self._session, self._endpoint)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def run(self, run: Run) -> list[Sample]:
        """Send one run; every request is in the result, also one that failed."""
        bodies = [self._body(prompt) for prompt in run.prompts]
        with _collector_at_rest():
            begin, raws = self._runner.run(self._sent(run, bodies))
        self._learn(raws)
        return [_sample(run, number, raw, begin, self._workload) for number, raw in enumerate(raws)]

    def measurements(self) -> Iterator[Measurement]:
        """What the generator itself took at every load, and the server's own figures."""
        for load, shares in self._processors.items():
            yield plain("client_processors", max(shares), load, len(shares))
        yield from self._sampler.gauges.measurements()

    def observed(self) -> dict[str, Any]:
        """What is to be known beside the figures; only what differs from the plain case."""
        busy = [load for load, shares in self._processors.items() if max(shares) > BUSY_PROCESSORS]
        found = {
            "server_medians": self._sampler.gauges.medians(),
            "sent_late": self._late,
            "client_is_the_limit": busy,
        }
        return {key: value for key, value in found.items() if value}

    async def _sent(self, run: Run, bodies: Sequence[bytes]) -> tuple[float, list[_Raw]]:
        """When the run began, and its requests."""
        await asyncio.sleep(_SETTLING_SECONDS)
        busy, begin = time.process_time(), time.perf_counter()
        if run.repeat < 0:
            return begin, await self._shape(run, bodies, begin)
        async with self._sampler.during(run.load.name):
            raws = await self._shape(run, bodies, begin)
        share = (time.process_time() - busy) / (time.perf_counter() - begin)
        if all(raw.failure is None for raw in raws):  # to be refused takes no time but the client's
            self._processors.setdefault(run.load.name, []).append(share)
        self._late += sum(
            raw.scheduled is not None and raw.sent - raw.scheduled > LATE_SECONDS for raw in raws
        )
        return begin, raws

    async def _shape(self, run: Run, bodies: Sequence[bytes], begin: float) -> list[_Raw]:
        if run.arrivals is None:
            return await self._closed(bodies, run.load.users or 1)
        return await self._open(bodies, [begin + moment for moment in run.arrivals])

    async def _closed(self, bodies: Sequence[bytes], users: int) -> list[_Raw]:
        """Each user sends a request when the one before is over."""
        raws = [_Raw(None) for _ in bodies]

        async def user(first: int) -> None:
            for number in range(first, len(bodies), users):
                await self._request(raws[number], bodies[number])

        await _all(user(first) for first in range(users))
        return raws

    async def _open(self, bodies: Sequence[bytes], moments: Sequence[float]) -> list[_Raw]:
        """Each request goes at its moment, whatever became of the others."""
        raws = [_Raw(moment) for moment in moments]

        async def arrival(raw: _Raw, body: bytes, moment: float) -> None:
            await asyncio.sleep(moment - time.perf_counter())
            await self._request(raw, body)

        await _all(map(arrival, raws, bodies, moments))
        return raws

    async def _request(self, raw: _Raw, body: bytes) -> None:
        keep = raw.chunks.append
        raw.sent = time.perf_counter()
        deadline = self._workload.deadline_seconds
        if raw.scheduled is not None:
            deadline -= raw.sent - raw.scheduled
        opened = transport.stream(
            self._session, self._endpoint, PATH, body, deadline, STALL_SECONDS
        )
        try:
            async with aclosing(opened) as chunks:
                async for chunk in chunks:
                    keep(chunk)
        except RequestFailed as failure:
            raw.failure = failure

    def _body(self, prompt: Sequence[int]) -> bytes:
        asked: dict[str, Any] = {
            "model": self._endpoint.model,
            "prompt": self._server.prompt(prompt),
            "max_tokens": self._workload.output_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self._counts:
            asked[_USAGE] = {"include_usage": True}
        return json.dumps({**asked, **self._endpoint.extra}).encode()

    def _learn(self, raws: Sequence[_Raw]) -> None:
        """A server that refuses to be asked for counts is not asked again."""
        refused = (raw.failure for raw in raws if raw.failure is not None)
        if any(each.status in _NOT_UNDERSTOOD and _USAGE in str(each) for each in refused):
            self._counts = False


def _sample(run: Run, number: int, raw: _Raw, begin: float, workload: Workload) -> Sample:
    """The request's times since the run began, and what its chunks say."""
    failure, answer = raw.failure, None
    if failure is None:
        try:
            answer = answers.read(raw.chunks)
        except RequestFailed as error:
            failure = error
    moments = (chunk.moment for chunk in raw.chunks) if answer is None else answer.arrivals
    arrivals = tuple(moment - begin for moment in moments)
    output = None if answer is None else answer.output_tokens
    prompt = None if answer is None else answer.prompt_tokens
    return Sample(
        load=run.load.name,
        repeat=run.repeat,
        number=number,
        scheduled=None if raw.scheduled is None else raw.scheduled - begin,
        sent=raw.sent - begin,
        arrivals=arrivals,
        prompt_tokens=workload.prompt_tokens if prompt is None else prompt,
        output_tokens=len(arrivals) if output is None else output,
        counted=output is not None,
        cached_tokens=0 if answer is None else answer.cached_tokens,
        kind=None if failure is None else failure.kind,
        error=None if failure is None else str(failure),
    )


async def _all(coroutines: Iterator[Coroutine[Any, Any, None]] | Any) -> None:
    async with asyncio.TaskGroup() as group:
        for each in coroutines:
            group.create_task(each)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """No pause of Python's garbage collector between two tokens: it would show as latency."""
    restore: Callable[[], None] = gc.enable if gc.isenabled() else gc.disable
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        restore()
