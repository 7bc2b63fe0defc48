"""The load generator: every load of a workload in turn, repeat by repeat, on any driver."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from qgrid.contracts import InvalidEngine
from qgrid.serving import schedule

if TYPE_CHECKING:
    from qgrid.serving.samples import Sample
    from qgrid.serving.schedule import Run
    from qgrid.types import Measurement, Workload

TOGETHER = 0.01  # of all gaps, that are told when they are none
GIVEN_UP = 2  # runs of a load in a row without one request that succeeded


class NothingServed(RuntimeError):
    """No request at batch 1 that counts succeeded: there is nothing to measure."""


class ServerGone(RuntimeError):
    """The server answered, and then no more: what it came to before is no measurement of it."""


class Driver(Protocol):
    """Sends the requests of a run, to a server or to an engine."""

    exact: bool  # requests have the length that was asked for, or the engine is not the right one

    def run(self, run: Run) -> list[Sample]:
        """One sample for every prompt, in their order."""

    def measurements(self) -> Iterable[Measurement]:
        """What it saw beside the requests."""

    def observed(self) -> dict[str, Any]:
        """What is to be known beside the figures."""


@dataclass
class Timed:
    """All measured samples, and the load averages of the machine when their runs began."""

    samples: list[Sample] = field(default_factory=list)
    averages: list[float] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)  # loads that were not tried to the end
    answered: int = 0  # requests that succeeded, warm-up included
    gone: str | None = None  # how the server ended, if it did


def timed(driver: Driver, workload: Workload, vocabulary: Sequence[int], seed: int) -> Timed:
    """Raw samples: loads take turns in every repeat, the warm-up is discarded.

    A load whose requests all fail twice in a row is not tried again, so that a dead server ends
    the measuring instead of costing every deadline. Where the last requests of all have failed, one
    more at batch 1 tells whether that was the load or the end of the server.

    Raises:
        InvalidEngine: a request of another length, where the driver promises exact ones.
        NothingServed: no request at batch 1 succeeded.
    """
    result = Timed()
    failed: dict[str, int] = {}
    single: Run | None = None  # the first of all, at batch 1
    latest: list[Sample] = []
    for repeat in schedule.runs(workload, vocabulary, seed):
        for run in repeat:
            single = run if single is None else single
            name = run.load.name
            if failed.get(name, 0) == GIVEN_UP:
                continue
            average = os.getloadavg()[0]
            samples = latest = driver.run(run)
            result.answered += sum(each.error is None for each in samples)
            if driver.exact:
                _require_lengths(samples, workload.output_tokens)
            failed[name] = failed.get(name, 0) + 1 if _all_failed(samples) else 0
            given_up = failed[name] == GIVEN_UP
            if run.repeat >= 0 or given_up:  # nothing else would tell of one that never worked
                result.samples += samples
                result.averages.append(average)
            if given_up:
                result.given_up.append(name)
                _require_served(result, samples, run)
    if single is not None and _all_failed(latest) and _all_failed(driver.run(single)):
        result.gone = f"no answer any more after {result.answered} requests: {latest[0].error}"
    return result


def _all_failed(samples: Sequence[Sample]) -> bool:
    return all(each.error is not None for each in samples)


def _require_lengths(samples: Sequence[Sample], wanted: int) -> None:
    for each in samples:
        if each.error is None and each.output_tokens != wanted:
            raise InvalidEngine(
                f"a timed request gave {each.output_tokens} tokens instead of {wanted}"
            )


def _require_served(result: Timed, last: Sequence[Sample], run: Run) -> None:
    """Give up altogether where batch 1 has never had an answer that counts."""
    served = any(each.load == run.load.name and each.error is None for each in result.samples)
    if run.load.users != 1 or served:
        return
    if result.answered:
        raise NothingServed(
            f"after {result.answered} requests of the warm-up none succeeded: {last[0].error}"
        )
    raise NothingServed(f"no request at batch 1 succeeded: {last[0].error}")


def observed(result: Timed, workload: Workload) -> dict[str, Any]:
    """What is to be known beside the figures; only what differs from the plain case."""
    good = [each for each in result.samples if each.error is None]
    cached = sum(each.cached_tokens for each in good)
    found = {
        "tokens_from_chunks": sum(not each.counted for each in good),
        "several_tokens_a_chunk": sum(each.output_tokens > len(each.arrivals) for each in good),
        "wrong_length": sum(each.output_tokens != workload.output_tokens for each in good),
        "other_prompt_length": sum(each.prompt_tokens != workload.prompt_tokens for each in good),
        "cached_prompt_tokens": cached,
    }
    counts: dict[str, Any] = {key: number for key, number in found.items() if number}
    together = _together(good)
    if together > TOGETHER:
        counts["arrived_together"] = together
    failures = _failures(result.samples)
    if failures:
        counts["failures"] = failures
    if result.given_up:
        counts["given_up"] = result.given_up
    return {"requests": len(result.samples), **counts}


def _together(samples: Sequence[Sample]) -> float:
    """Share of the gaps between arrivals that are none: several chunks lay in one read.

    The server sent them at once, or somebody kept the client from reading; then the times of the
    first and last token are not those of the server, either.
    """
    gaps = [gap for each in samples for gap in each.gaps]
    return sum(gap == 0 for gap in gaps) / len(gaps) if gaps else 0.0


def _failures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Load -> kind of failure -> how often, and the first sentence."""
    found: dict[str, Any] = {}
    for each in samples:
        if each.error is not None:
            kinds = found.setdefault(each.load, {})
            known = kinds.setdefault(each.kind, {"requests": 0, "first": each.error})
            known["requests"] += 1
    return found
