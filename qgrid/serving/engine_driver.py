"""A load on an engine in this process, which takes whole batches and nothing in between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qgrid.serving.samples import Sample

if TYPE_CHECKING:
    from qgrid.contracts import Engine, Generation
    from qgrid.serving.schedule import Run
    from qgrid.types import Measurement, Workload


class EngineDriver:
    """Closed loop: waves of as many requests as there are users.

    Open loop: static batches of whatever has arrived when the one before is over; what arrives
    meanwhile waits, and its wait counts.
    """

    exact = True

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine = engine
        self._workload = workload

    def run(self, run: Run) -> list[Sample]:
        """Generate for one run, in the order of its prompts."""
        begin = time.perf_counter()
        moments = run.arrivals
        samples: list[Sample] = []
        while len(samples) < len(run.prompts):
            first = len(samples)
            count = run.load.users or 1 if moments is None else _arrived(moments, first, begin)
            sent = time.perf_counter() - begin
            made = self._engine.generate(
                run.prompts[first : first + count], self._workload.output_tokens
            )
            samples += [
                self._sample(run, first + place, sent, each) for place, each in enumerate(made)
            ]
        return samples

    def measurements(self) -> tuple[Measurement, ...]:
        """Nothing beside the samples."""
        return ()

    def observed(self) -> dict[str, Any]:
        """Nothing beside the samples."""
        return {}

    def _sample(self, run: Run, number: int, sent: float, made: Generation) -> Sample:
        scheduled = None if run.arrivals is None else run.arrivals[number]
        arrivals = tuple(sent + moment for moment in made.seconds)
        origin = sent if scheduled is None else scheduled
        kind, error = None, made.error
        if error is not None:
            kind = "status"
        elif not arrivals:
            kind, error = "garbage", "the engine gave no token"
        elif arrivals[-1] - origin > self._workload.deadline_seconds:
            kind, error = "timeout", "the request was over after its deadline had passed"
        return Sample(
            load=run.load.name,
            repeat=run.repeat,
            number=number,
            scheduled=scheduled,
            sent=sent,
            arrivals=arrivals,
            prompt_tokens=self._workload.prompt_tokens,
            output_tokens=len(made.ids),
            counted=True,
            kind=kind,
            error=error,
        )


def _arrived(moments: Sequence[float], first: int, begin: float) -> int:
    """How many requests from `first` on are there; sleeps until the next where there is none."""
    time.sleep(max(0.0, begin + moments[first] - time.perf_counter()))
    now = time.perf_counter() - begin
    return max(1, sum(moment <= now for moment in moments[first:]))
