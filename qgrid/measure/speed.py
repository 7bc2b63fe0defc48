"""The speed stage: memory, throughput and latency of one cell at every load of its workload."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qgrid import files, models, registry
from qgrid.device import compute_threads
from qgrid.measure._vocabulary import text_config, vocabulary
from qgrid.measure.bystanders import Bystanders
from qgrid.measure.encoding import positions, require_positions
from qgrid.measure.loading import DTYPE_BYTES, Phases, load
from qgrid.measure.process_memory import Peak
from qgrid.serving import load as loads
from qgrid.serving import users
from qgrid.serving.engine_driver import EngineDriver
from qgrid.serving.http_driver import HttpDriver
from qgrid.serving.summary import plain, summary
from qgrid.timing import UNSTABLE_CV
from qgrid.types import Check, Measurement, StageResult

if TYPE_CHECKING:
    from qgrid.contracts import Engine, Memory, Server
    from qgrid.serving.load import Driver, Timed
    from qgrid.serving.samples import Sample
    from qgrid.types import Cell, Job, Workload

_HELD = {  # metric -> field of `Memory`
    "resident_weights_bytes": "weights_bytes",
    "kv_bytes_per_token": "kv_bytes_per_token",
    "kv_pool_bytes": "kv_pool_bytes",
    "activation_peak_bytes": "activation_peak_bytes",
    "reserved_bytes": "reserved_bytes",
    "max_concurrency": "max_concurrency",
}


@dataclass(frozen=True)
class _Seen:
    """A timing with what was seen around it; None where it cannot be known."""

    timing: Timed
    measurements: tuple[Measurement, ...]  # of the driver
    observed: Mapping[str, Any]  # of the driver
    busy_elsewhere: float | None


def measure(job: Job) -> StageResult:
    """Load or start once, time, and weigh; writes `samples.jsonl` into `job.out`.

    Raises:
        InvalidEngine: the engine is not what was asked for, or gives other lengths.
        NothingServed: no request at batch 1 succeeded.
        ServerGone: the server ended; `samples.jsonl` holds what it answered.
        ValueError: a workload that cannot be timed.
    """
    cell, folder = job.planned.cell, Path(job.artifact)
    _require_workload(cell.workload, folder)
    phases = Phases()
    with ExitStack() as held:
        with _peak(cell) as peak:
            with phases("load"):
                subject = held.enter_context(closing(_opened(folder, cell)))
            with phases("timing"):
                seen = _timed(subject, cell, folder)
        _write_samples(Path(job.out), seen.timing.samples)
        if seen.timing.gone is not None:
            raise loads.ServerGone(f"{seen.timing.gone} (what it answered: samples.jsonl)")
        with phases("summary"):
            result = _result(cell, folder, subject, seen, None if peak is None else peak.bytes)
    return replace(result, seconds=phases.seconds)


def _serve(cell: Cell) -> Any:
    """The runtime's hook that starts a server; None where an engine in this process is timed."""
    return getattr(registry.runtime(cell.runtime.name), "serve", None)


def _opened(folder: Path, cell: Cell) -> Engine | Server:
    serve = _serve(cell)
    if serve is None:
        return load(folder, cell, cell.runtime.speed_dtype)
    return cast("Server", serve(folder, cell, cell.runtime.speed_dtype))


def _peak(cell: Cell) -> AbstractContextManager[Peak | None]:
    """The memory of this process tells nothing of a server's."""
    return Peak(cell.gpu.kind) if _serve(cell) is None else nullcontext()


def _timed(subject: Engine | Server, cell: Cell, folder: Path) -> _Seen:
    """Time all loads. Of somebody else's server no processor is known to be in its way."""
    endpoint = getattr(subject, "endpoint", None)
    with _driver(subject, cell.workload) as driver, Bystanders(_threads(cell)) as others:
        timing = loads.timed(driver, cell.workload, vocabulary(folder), cell.seed)
    known = endpoint is None or endpoint.own
    return _Seen(
        timing,
        tuple(driver.measurements()),
        {**loads.observed(timing, cell.workload), **driver.observed()},
        others.processors if known else None,
    )


def _driver(subject: Engine | Server, workload: Workload) -> AbstractContextManager[Driver]:
    if hasattr(subject, "endpoint"):
        return HttpDriver(cast("Server", subject), workload)
    return nullcontext(EngineDriver(subject, workload))


def _result(
    cell: Cell, folder: Path, subject: Engine | Server, seen: _Seen, peak: int | None
) -> StageResult:
    samples, slo = seen.timing.samples, cell.workload.slo
    memory = subject.memory()
    levels = users.levels(samples, slo)
    measured = (
        *_weighed(memory, peak, seen.busy_elsewhere),
        *summary(samples, slo),
        *users.measurements(levels),
        *seen.measurements,
        *_priced(cell),
    )
    bounds = users.at_least(levels)
    observed = {
        **subject.observed(),
        **seen.observed,
        **_conditions(seen.timing, measured),
        **({"at_least": bounds} if bounds else {}),
    }
    checks = (
        *subject.checks(),
        *_ceiling(cell, _read_bytes(cell, folder, memory, observed), measured),
    )
    return StageResult("speed", measurements=measured, checks=checks, observed=observed)


def _priced(cell: Cell) -> Iterator[Measurement]:
    """What the tokens cost where they are bought by the million, see `RuntimeModule`."""
    hook = getattr(registry.runtime(cell.runtime.name), "price", None)
    price: Measurement | None = None if hook is None else hook(cell)
    if price is not None:
        yield price


def _weighed(memory: Memory | None, peak: int | None, busy: float | None) -> Iterator[Measurement]:
    """Every figure of memory that is known, and who else was computing."""
    found: dict[str, float | None] = {"peak_memory_bytes": peak, "busy_elsewhere": busy}
    if memory is not None:
        found |= {metric: getattr(memory, field) for metric, field in _HELD.items()}
        if memory.peak_bytes is not None:
            found["peak_memory_bytes"] = memory.peak_bytes
    for metric, value in found.items():
        if value is not None:
            yield plain(metric, value)


def _threads(cell: Cell) -> int:
    """Threads that compute, or the one that feeds a GPU."""
    return compute_threads(cell.runtime.threads) if cell.gpu.kind == "cpu" else 1


def _require_workload(workload: Workload, folder: Path) -> None:
    """Refuse what leaves nothing to time: decoding begins after the first token."""
    if workload.output_tokens < 2:
        raise ValueError(f"`workload.output_tokens={workload.output_tokens}` should be 2 or more")
    total = workload.prompt_tokens + workload.output_tokens
    known = positions(folder) if (folder / "config.json").is_file() else None
    require_positions(known, total, f"a request of `workload={workload.name}`")


def _conditions(timing: Timed, measured: Sequence[Measurement]) -> dict[str, Any]:
    """What the timing ran under; `unstable` lists the loads whose repeats vary too much."""
    return {
        "load_average": {"lowest": min(timing.averages), "highest": max(timing.averages)},
        "unstable": [
            each.slice
            for each in measured
            if each.metric == "timing_cv" and each.value > UNSTABLE_CV
        ],
    }


def _write_samples(out: Path, samples: Sequence[Sample]) -> None:
    lines = (json.dumps(each.plain()) + "\n" for each in samples)
    files.write_atomic(out / "samples.jsonl", "".join(lines))


def _read_bytes(
    cell: Cell, folder: Path, memory: Memory | None, observed: Mapping[str, Any]
) -> int | None:
    """Bytes of weights that a token reads; None where the weights are not known."""
    if memory is None:
        return None
    return memory.weights_bytes - _unread_bytes(cell, folder, observed)


def _unread_bytes(cell: Cell, folder: Path, observed: Mapping[str, Any]) -> int:
    """Bytes of an embedding table of its own, of which a token reads one row.

    As the engine tells, else as wide as the speed dtype.
    """
    told = observed.get("unread_table_bytes")
    if told is not None:
        return int(told)
    config = text_config(folder)
    if models.tied(config):
        return 0
    width = DTYPE_BYTES[cell.runtime.speed_dtype]
    return width * int(config["vocab_size"]) * int(config["hidden_size"])


def _ceiling(
    cell: Cell, read_bytes: int | None, measurements: Sequence[Measurement]
) -> tuple[Check, ...]:
    """Batch-1 decoding reads `read_bytes` a token: memory bandwidth bounds its speed."""
    bandwidth = cell.gpu.bandwidth_gb_s
    if bandwidth is None or read_bytes is None:
        return ()
    ceiling = bandwidth * cell.gpu.count * 1e9 / read_bytes
    speeds = (
        m.value
        for m in measurements
        if m.metric == "decode_throughput" and m.slice == "concurrency=1"
    )
    return tuple(
        Check(
            "decode_below_bandwidth",
            ok=speed <= ceiling,
            expected=f"at most {ceiling:.1f} tok/s at batch 1",
            actual=f"{speed:.1f} tok/s",
            fatal=False,
        )
        for speed in speeds
    )
