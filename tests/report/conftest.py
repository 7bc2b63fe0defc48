"""A sweep as a run leaves it: nine measured cells and two refused ones, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from qgrid.metrics import METRICS
from qgrid.types import (
    RECORD_SCHEMA,
    Calibration,
    Cell,
    Check,
    Failure,
    Gpu,
    KvCache,
    Measurement,
    Method,
    Model,
    PlannedCell,
    Record,
    Runtime,
    Slice,
    Slices,
    Workload,
)

BASE = {
    "classification": 0.94,
    "extraction": 0.86,
    "retrieval": 0.81,
    "structured": 0.77,
    "arithmetic": 0.62,
    "code": 0.71,
    "knowledge": 0.83,
    "long_context": 0.66,
}
LEVELS = (1, 2, 4, 8, 16)  # concurrencies of a served cell
SLICES = Slices(
    "demo", None, {name: Slice(f"{name}.jsonl", "exact", True, 100, 8) for name in BASE}
)
CALIBRATION = Calibration("tiny", "calibration.jsonl", None, None, "train", "text", 128, 512)
CALIBRATED = ("gptq", "awq")
UNPACKED = ("rtn", "gptq", "awq")
# method, bits -> KLD, points lost on an easy and on a hard slice, decode tok/s
MEASURED: dict[tuple[str, int], tuple[float, float, float, float]] = {
    ("none", 16): (0.0, 0.0, 0.0, 118.0),
    ("int8", 8): (0.00021, 0.0, 0.002, 86.0),
    ("nf4", 4): (0.0182, 0.004, 0.021, 104.0),
    ("rtn", 8): (0.00004, 0.0, 0.0, 117.0),
    ("rtn", 4): (0.0304, 0.008, 0.062, 116.5),
    ("gptq", 8): (0.00003, 0.0, 0.001, 118.5),
    ("gptq", 4): (0.0141, 0.002, 0.034, 117.2),
    ("awq", 8): (0.00004, 0.001, 0.0, 117.6),
    ("awq", 4): (0.0163, 0.002, 0.028, 118.1),
}
REFUSED = {
    ("int8", 4): "method `int8` has no `bits=4` (has: 8); methods with 4 bits: awq, gptq, nf4, rtn",
    ("nf4", 8): "method `nf4` has no `bits=8` (has: 4); use `method=int8`",
}


@dataclass(frozen=True)
class Sweep:
    """A plan and the records of it."""

    planned: list[PlannedCell]
    records: list[Record]

    def record(self, method: str, bits: int) -> Record:
        """The record of one cell."""
        return next(r for r in self.records if (r.cell.method.name, r.cell.bits) == (method, bits))

    def changed(self, method: str, bits: int, **changes: Any) -> Sweep:
        """The sweep with fields of one record replaced."""
        old = self.record(method, bits)
        new = replace(old, **changes)
        return Sweep(self.planned, [new if each is old else each for each in self.records])

    def measured(self, method: str, bits: int, *measurements: Measurement) -> Sweep:
        """The sweep with measurements of one record replaced or added."""
        old = self.record(method, bits)
        by_key = {(m.metric, m.slice): m for m in (*old.measurements, *measurements)}
        return self.changed(method, bits, measurements=tuple(by_key.values()))

    def observing(self, method: str, bits: int, **seen: Any) -> Sweep:
        """The sweep whose speed stage told more of one engine."""
        old = self.record(method, bits).observed
        return self.changed(method, bits, observed={**old, "speed": {**old["speed"], **seen}})


def number(metric: str, value: float, part: str | None = None, **more: Any) -> Measurement:
    """A measurement in the unit of its metric."""
    return Measurement(metric, value, METRICS[metric].unit, part, **more)


def change(name: str, value: float, half: float) -> Measurement:
    """A paired change of a slice's accuracy with its interval."""
    more = {"stderr": half / 1.96, "n": 500, "low": value - half, "high": value + half}
    return number("accuracy_delta", value, name, **more)


def cell(method: str, bits: int) -> Cell:
    """The cell of a method and width on the embedded model."""
    options = {"group_size": 128} if method in UNPACKED else {}
    return Cell(
        model=Model("tiny", "qgrid/tiny", None, False, False),
        method=Method(method, options),
        bits=bits,
        runtime=Runtime(
            "transformers", "float32", "bfloat16", None, {"attn_implementation": "sdpa"}
        ),
        gpu=Gpu("auto", "cpu", "", None, 24.0, None, 1),
        kv_cache=KvCache("auto16", 16),
        calibration=CALIBRATION if method in CALIBRATED else None,
        slices=SLICES,
        workload=Workload("demo", 128, 32, (1, 4), 2, 5),
        context=512,
        seed=0,
    )


def planned_cell(method: str, bits: int) -> PlannedCell:
    """A cell as planned; the ids are readable here."""
    key = (method, bits)
    base = None if method == "none" else "cell-none-16"
    return PlannedCell(
        cell_id=f"cell-{method}-{bits}",
        artifact_id=f"artifact-{method}-{bits}",
        quality_id=f"quality-{method}-{bits}",
        baseline_cell_id=base,
        cell=cell(method, bits),
        added=False,
        status="unsupported" if key in REFUSED else None,
        reason=REFUSED.get(key),
        notes=("`none` has the one width 16; `bits=4` gives the same cell",) if not base else (),
        predicted={"weight_bytes": 7.2e6 * (0.25 + 0.75 * bits / 16)},
    )


def measurements(method: str, bits: int) -> tuple[Measurement, ...]:
    """Everything that the stages of one cell measure."""
    kld, easy, hard, decode = MEASURED[method, bits]
    return (
        *_sizes(method, bits),
        *_speeds(decode),
        *_prose(kld, is_baseline=method == "none"),
        *_slices(easy, hard, is_baseline=method == "none"),
    )


def _sizes(method: str, bits: int) -> list[Measurement]:
    stored = 16.0 if bits == 16 else bits + {"int8": 0.03, "nf4": 0.5}.get(method, 0.125)
    resident = 7_200_000.0 if method in UNPACKED or bits == 16 else 3_600_000.0 + bits * 60_000
    return [
        number("size_on_disk_bytes", 7_200_000 * (0.25 + 0.75 * stored / 16)),
        number("bits_per_weight", 16 * (0.25 + 0.75 * stored / 16)),
        number("linear_bits_per_weight", stored),
        number("resident_weights_bytes", resident),
        number("kv_bytes_per_token", 2048.0),
        number("peak_memory_bytes", resident + 31_000_000),
    ]


def _speeds(decode: float) -> list[Measurement]:
    found = []
    for users in (1, 4):
        part, speed = f"concurrency={users}", decode * users**0.7
        found += [
            number(
                "prefill_throughput", 41 * speed, part, n=5, low=40.5 * speed, high=41.6 * speed
            ),
            number("decode_throughput", speed, part, n=5, low=0.985 * speed, high=1.012 * speed),
            number("timing_cv", 0.012, part, n=5),
            number("ttft_ms", 26.4 * users, part, n=5 * users, low=26.0 * users, high=27.1 * users),
            number("ttft_p90_ms", 28.0 * users, part, n=5 * users),
            number("itl_ms", 1000 / decode, part, n=155, low=990 / decode, high=1020 / decode),
            number("tpot_ms", 1001 / decode, part, n=5, low=990 / decode, high=1020 / decode),
            number(
                "e2e_latency_ms", 32e3 / decode, part, n=5, low=31e3 / decode, high=33e3 / decode
            ),
        ]
    return found


def _prose(kld: float, is_baseline: bool) -> list[Measurement]:
    ppl = 6.2137 * (1 + kld)
    found = [number("ppl", ppl, stderr=0.06, n=16352, low=ppl - 0.12, high=ppl + 0.12)]
    if is_baseline:
        return [*found, number("kld_floor", 1.3e-4, stderr=2e-6, n=16352)]
    error = kld / 40
    return [
        *found,
        number("ln_ppl_ratio", kld, stderr=error, n=16352, low=kld - error, high=kld + error),
        number("kld_mean", kld, stderr=error, n=16352, low=kld - 2 * error, high=kld + 2 * error),
        number("kld_median", kld / 3, n=16352),
        number("kld_p99", 9 * kld, n=16352),
        number("kld_max", 60 * kld, n=16352),
        number("same_top_p", 1 - 0.6 * kld**0.5, stderr=0.001, n=16352),
        number("delta_p_mean", -kld / 4, stderr=error, n=16352),
        number("delta_p_rms", kld**0.5, n=16352),
    ]


def _slices(easy: float, hard: float, is_baseline: bool) -> list[Measurement]:
    found = []
    for name, base in BASE.items():
        drop = easy if base > 0.8 else hard
        share = base - drop
        half = 1.96 * (share * (1 - share) / 500) ** 0.5
        found += [
            number(
                "accuracy",
                share,
                name,
                stderr=half / 1.96,
                n=500,
                low=share - half,
                high=share + half,
            ),
            number("answer_logprob", -1.1 - drop, name, stderr=0.05, n=500),
        ]
        if not is_baseline:
            found += [
                change(name, -drop, 0.012 + drop / 2),
                number("answer_logprob_delta", -drop, name, stderr=0.01, n=500),
            ]
    return found


def observed(method: str, bits: int) -> dict[str, Any]:
    """What the stages saw of the engine."""
    stored = "bfloat16" if bits == 16 else "pack-quantized"
    stored = {"nf4": "bitsandbytes-nf4", "int8": "bitsandbytes-int8"}.get(method, stored)
    unpacks = method in UNPACKED
    seen = {
        "device": "cpu",
        "kernels": {"Linear": 29},
        "stores_in": {stored: 28},
        "computes_in": {"bfloat16" if unpacks else stored: 28},
        "decompressed": unpacks,
    }
    return {"device": {"name": "auto"}, "quality": seen, "speed": seen}


def record(planned: PlannedCell) -> Record:
    """The record of a planned cell."""
    method, bits = planned.cell.method.name, planned.cell.bits
    is_refused = planned.status is not None
    return Record(
        schema=RECORD_SCHEMA,
        cell_id=planned.cell_id,
        artifact_id=planned.artifact_id,
        quality_id=planned.quality_id,
        baseline_cell_id=planned.baseline_cell_id,
        status="ok" if planned.status is None else planned.status,
        cell=planned.cell,
        artifact={} if is_refused else {"modules": {f"{method} pack-quantized {bits}": 28}},
        measurements=() if is_refused else measurements(method, bits),
        checks=() if is_refused else (Check("bits", True, f"{bits} bits", f"{bits} bits"),),
        observed={} if is_refused else observed(method, bits),
        environment={"python": "3.11.7", "versions": {"torch": "2.13.0"}, "cpu": "a processor"},
        timings={} if is_refused else {"speed.timing_seconds": 4.1, "work_seconds": 21.5},
        notes=planned.notes,
        error=Failure(planned.status, planned.reason or "") if planned.status else None,
    )


@pytest.fixture
def sweep() -> Sweep:
    """`none,int8,nf4,rtn,gptq,awq` at 4 and 8 bits, as planned and measured."""
    planned = [planned_cell(*key) for key in (*MEASURED, *REFUSED)]
    return Sweep(planned, [record(each) for each in planned])


@pytest.fixture
def make_number() -> Callable[..., Measurement]:
    """`number(metric, value, slice, ...)` for tests."""
    return number


@pytest.fixture
def make_change() -> Callable[[str, float, float], Measurement]:
    """`change(slice, value, half width)` for tests."""
    return change


def curve(peak: float, alone: float) -> list[Measurement]:
    """A server that saturates: throughput towards `peak`, latency as Little's law has it."""
    found = [number("goodput", 2.5, "rate=4", n=5), number("output_throughput", 90.0, "rate=4")]
    for users in LEVELS:
        part, speed = f"concurrency={users}", peak * users / (users + peak / alone - 1)
        near = {"n": 5, "low": 0.98 * speed, "high": 1.02 * speed}
        tpot = 1000 * users / speed
        found += [
            number("output_throughput", speed, part, **near),
            number("decode_throughput", 1.1 * speed, part, n=5, low=speed, high=1.2 * speed),
            number("goodput", speed / 32, part, n=5),
            number("ttft_ms", 20.0 * users, part, n=40, low=19.0 * users, high=21.0 * users),
            number("ttft_p99_ms", 31.0 * users, part, n=40),
            number("tpot_ms", tpot, part, n=40, low=0.9 * tpot, high=1.1 * tpot),
            number("failed_requests", 0.0, part, n=40),
            number("timing_cv", 0.01, part, n=5),
        ]
    return found


@pytest.fixture
def served(sweep: Sweep) -> Sweep:
    """Two cells with a curve of five concurrencies and an open loop, knee and users told."""
    for (method, bits), (peak, alone) in {("none", 16): (300, 90), ("nf4", 4): (210, 120)}.items():
        told = [number("knee_concurrency", 4.0), number("max_users", 16.0)]
        sweep = sweep.measured(method, bits, *curve(peak, alone), *told)
    return sweep.observing("nf4", 4, at_least=["max_users"])
