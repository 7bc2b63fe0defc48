"""The speed stage: memory, throughput and latency of one cell at every load of its workload."""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import files, models, stats
from qgrid.contracts import InvalidEngine
from qgrid.device import compute_threads
from qgrid.measure.bystanders import Bystanders
from qgrid.measure.encoding import positions, require_positions
from qgrid.measure.loading import DTYPE_BYTES, Phases, load
from qgrid.measure.process_memory import Peak
from qgrid.metrics import METRICS
from qgrid.timing import UNSTABLE_CV
from qgrid.types import Check, Measurement, StageResult

if TYPE_CHECKING:
    from qgrid.contracts import Engine, Generation
    from qgrid.types import Cell, Job, Workload

MIN_WARMUP, MIN_REPEATS = 2, 5
_MS = 1000.0
_LATENCIES = ("ttft", "itl", "tpot", "e2e_latency")


@dataclass(frozen=True)
class Sample:
    """One timed batch: `concurrency` requests at once, every list per request or per token."""

    concurrency: int
    repeat: int
    prefill_throughput: float  # tok/s, all requests
    decode_throughput: float
    ttft_ms: list[float]
    itl_ms: list[float]
    tpot_ms: list[float]
    e2e_latency_ms: list[float]
    load_average: float  # of the last minute, when the batch began


def measure(job: Job) -> StageResult:
    """Load once, time, and weigh; writes `samples.jsonl` into `job.out`.

    Raises:
        InvalidEngine: the engine is not what was asked for, or gives other lengths.
        ValueError: a workload that cannot be timed.
    """
    cell = job.planned.cell
    _require_workload(cell.workload, Path(job.artifact))
    phases = Phases()
    with Peak(cell.gpu.kind) as peak:
        with phases("load"):
            engine = load(job.artifact, cell, cell.runtime.speed_dtype)
        with phases("timing"), Bystanders(_threads(cell)) as others:
            samples = timed(engine, cell.workload, vocabulary(Path(job.artifact)), cell.seed)
    with phases("summary"):
        memory = engine.memory()
        assert memory is not None  # an engine in this process knows
        held = {
            "resident_weights_bytes": memory.weights_bytes,
            "kv_bytes_per_token": memory.kv_bytes_per_token,
            "peak_memory_bytes": peak.bytes if memory.peak_bytes is None else memory.peak_bytes,
            "busy_elsewhere": others.processors,
        }
        weighed = [_plain(metric, value) for metric, value in held.items() if value is not None]
        measurements = (*weighed, *summary(samples))
        observed = {**engine.observed(), **_conditions(samples)}
        read = memory.weights_bytes - _unread_bytes(cell, Path(job.artifact), observed)
        checks = (*engine.checks(), *_ceiling(cell, read, measurements))
        engine.close()
        _write_samples(Path(job.out), samples)
    return StageResult(
        "speed",
        measurements=measurements,
        checks=checks,
        observed=observed,
        seconds=phases.seconds,
    )


def _threads(cell: Cell) -> int:
    """Threads that compute, or the one that feeds a GPU."""
    return compute_threads(cell.runtime.threads) if cell.gpu.kind == "cpu" else 1


def _require_workload(workload: Workload, folder: Path) -> None:
    """Refuse what leaves nothing to time: decoding begins after the first token."""
    if workload.output_tokens < 2:
        raise ValueError(f"`workload.output_tokens={workload.output_tokens}` should be 2 or more")
    total = workload.prompt_tokens + workload.output_tokens
    require_positions(positions(folder), total, f"a request of `workload={workload.name}`")


def timed(engine: Engine, workload: Workload, vocab: int, seed: int) -> list[Sample]:
    """Raw samples: loads take turns in every repeat, the warm-up is discarded."""
    loads = list(dict.fromkeys((1, *workload.concurrency)))
    rng = random.Random(f"{seed}:{workload.prompt_tokens}")
    warmup = max(workload.warmup, MIN_WARMUP)
    repeats = max(workload.repeats, MIN_REPEATS)
    samples = []
    for repeat in range(-warmup, repeats):
        for concurrency in loads:
            prompts = _unique_prompts(rng, concurrency, workload.prompt_tokens, vocab)
            began = _load_average()
            made = engine.generate(prompts, workload.output_tokens)
            _require_lengths(made, workload.output_tokens)
            if repeat >= 0:
                samples.append(sample(made, concurrency, repeat, workload.prompt_tokens, began))
    return samples


def _unique_prompts(rng: random.Random, count: int, length: int, vocab: int) -> list[list[int]]:
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(count)]


def _require_lengths(made: Sequence[Generation], wanted: int) -> None:
    short = next((len(each.ids) for each in made if len(each.ids) != wanted), None)
    if short is not None:
        raise InvalidEngine(f"a timed request gave {short} tokens instead of {wanted}")


def sample(
    made: Sequence[Generation], concurrency: int, repeat: int, prompt_tokens: int, began: float
) -> Sample:
    """Times of one batch.

    Decoding begins when the last request has its first token; tokens that others got before, while
    prompts were still being read, count for neither rate.
    """
    firsts = [each.seconds[0] for each in made]
    lasts = [each.seconds[-1] for each in made]
    steps = len(made[0].ids) - 1
    begin = max(firsts)
    decoded = sum(moment > begin for each in made for moment in each.seconds)
    gaps = [
        later - earlier
        for each in made
        for earlier, later in zip(each.seconds, each.seconds[1:], strict=False)
    ]
    return Sample(
        concurrency=concurrency,
        repeat=repeat,
        prefill_throughput=concurrency * prompt_tokens / begin,
        decode_throughput=decoded / (max(lasts) - begin),
        ttft_ms=[_MS * first for first in firsts],
        itl_ms=[_MS * gap for gap in gaps],
        tpot_ms=[_MS * (last - first) / steps for first, last in zip(firsts, lasts, strict=True)],
        e2e_latency_ms=[_MS * last for last in lasts],
        load_average=began,
    )


def summary(samples: Sequence[Sample]) -> list[Measurement]:
    """Every metric at every load, never mixed."""
    loads = dict.fromkeys(each.concurrency for each in samples)
    return [
        measurement
        for load_ in loads
        for measurement in _at_load(load_, [s for s in samples if s.concurrency == load_])
    ]


def _at_load(concurrency: int, samples: Sequence[Sample]) -> list[Measurement]:
    name = f"concurrency={concurrency}"
    prefill = [each.prefill_throughput for each in samples]
    decode = [each.decode_throughput for each in samples]
    found = [
        _median("prefill_throughput", name, prefill),
        _median("decode_throughput", name, decode),
        _plain("timing_cv", variation(decode), name, len(decode)),
    ]
    for metric in _LATENCIES:
        by_repeat: list[list[float]] = [getattr(each, f"{metric}_ms") for each in samples]
        found += _latency(metric, name, by_repeat)
    return found


def _median(metric: str, name: str, values: Sequence[float]) -> Measurement:
    low, high = stats.bootstrap_median(values)
    return Measurement(
        metric, statistics.median(values), METRICS[metric].unit, name, None, len(values), low, high
    )


def _latency(metric: str, name: str, by_repeat: Sequence[Sequence[float]]) -> list[Measurement]:
    """p50 with the interval of the repeats' medians, p90 and p99 of all values."""
    values = [value for each in by_repeat for value in each]
    low, high = stats.bootstrap_median([stats.percentile(each, 0.5) for each in by_repeat])
    middle = stats.percentile(values, 0.5)
    return [
        Measurement(f"{metric}_ms", middle, "ms", name, None, len(values), low, high),
        _plain(f"{metric}_p90_ms", stats.percentile(values, 0.9), name, len(values)),
        _plain(f"{metric}_p99_ms", stats.percentile(values, 0.99), name, len(values)),
    ]


def variation(values: Sequence[float]) -> float:
    """Coefficient of variation: sample standard deviation over mean."""
    middle = statistics.fmean(values)
    return statistics.stdev(values) / middle if len(values) > 1 and middle else 0.0


def _plain(metric: str, value: float, name: str | None = None, n: int | None = None) -> Measurement:
    return Measurement(metric, float(value), METRICS[metric].unit, name, n=n)


def _conditions(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the timing ran under; `unstable` lists the loads whose repeats vary too much."""
    averages = [each.load_average for each in samples]
    loads = dict.fromkeys(each.concurrency for each in samples)
    varied = {
        load_: variation([s.decode_throughput for s in samples if s.concurrency == load_])
        for load_ in loads
    }
    return {
        "load_average": {"lowest": min(averages), "highest": max(averages)},
        "unstable": [f"concurrency={each}" for each, cv in varied.items() if cv > UNSTABLE_CV],
    }


def _load_average() -> float:
    return os.getloadavg()[0]


def _write_samples(out: Path, samples: Sequence[Sample]) -> None:
    lines = (json.dumps(asdict(each)) + "\n" for each in samples)
    files.write_atomic(out / "samples.jsonl", "".join(lines))


def vocabulary(folder: Path) -> int:
    """Number of token ids that prompts are drawn from.

    Raises:
        KeyError: the checkpoint's `config.json` does not say.
    """
    return int(_text_config(folder)["vocab_size"])


def _text_config(folder: Path) -> dict[str, Any]:
    """`config.json`; where a model is more than text, the part about text."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}


def _unread_bytes(cell: Cell, folder: Path, observed: Mapping[str, Any]) -> int:
    """Bytes of an embedding table of its own, of which a token reads one row.

    As the engine tells, else as wide as the speed dtype.
    """
    told = observed.get("unread_table_bytes")
    if told is not None:
        return int(told)
    config = _text_config(folder)
    if models.tied(config):
        return 0
    width = DTYPE_BYTES[cell.runtime.speed_dtype]
    return width * int(config["vocab_size"]) * int(config["hidden_size"])


def _ceiling(cell: Cell, read_bytes: int, measurements: Sequence[Measurement]) -> tuple[Check, ...]:
    """Batch-1 decoding reads `read_bytes` a token: memory bandwidth bounds its speed."""
    bandwidth = cell.gpu.bandwidth_gb_s
    if bandwidth is None:
        return ()
    ceiling = bandwidth * cell.gpu.count * 1e9 / read_bytes
    speed = next(
        m.value
        for m in measurements
        if m.metric == "decode_throughput" and m.slice == "concurrency=1"
    )
    return (
        Check(
            "decode_below_bandwidth",
            ok=speed <= ceiling,
            expected=f"at most {ceiling:.1f} tok/s at batch 1",
            actual=f"{speed:.1f} tok/s",
            fatal=False,
        ),
    )
