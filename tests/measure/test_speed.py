"""Timing on a known sleep, memory on a known allocation."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec
from qgrid.contracts import Generation, InvalidEngine, Memory
from qgrid.measure import process_memory, speed
from qgrid.measure._vocabulary import vocabulary
from qgrid.measure.process_memory import Peak
from qgrid.runtimes import transformers as runtime
from qgrid.serving import load
from qgrid.serving.engine_driver import EngineDriver
from qgrid.serving.load import NothingServed, Timed
from qgrid.serving.summary import summary
from qgrid.timing import UNSTABLE_CV
from qgrid.types import Cell, Check, Gpu, Job, Slo, StageResult, Workload
from tests.serving.made import sample
from tests.serving.stub import Clock, Stub, status

PREFILL, STEP = 0.02, 0.005


class Sleeper:
    """An engine that takes a known time: a prefill, then one step a token."""

    def __init__(self, missing: int = 0) -> None:
        self.asked: list[tuple[int, int]] = []
        self.prompts: list[tuple[int, ...]] = []
        self.missing = missing

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        assert not stop
        self.asked.append((len(prompts), max_new_tokens))
        self.prompts += [tuple(prompt) for prompt in prompts]
        begin = time.perf_counter()
        moments = []
        for i in range(max_new_tokens - self.missing):
            time.sleep(STEP if i else PREFILL)
            moments.append(time.perf_counter() - begin)
        return [Generation((7,) * len(moments), tuple(moments)) for _ in prompts]

    def memory(self) -> Memory:
        return Memory(1000, 10)

    def observed(self) -> Mapping[str, Any]:
        return {"device": "sleeper"}

    def close(self) -> None:
        pass


WORKLOAD = Workload(
    "test", prompt_tokens=16, output_tokens=6, concurrency=(1, 4), warmup=2, repeats=5
)


@pytest.fixture(scope="module")
def slept() -> tuple[Sleeper, Timed]:
    engine = Sleeper()
    driver = EngineDriver(engine, WORKLOAD)  # type: ignore[arg-type]
    return engine, load.timed(driver, WORKLOAD, range(1000), seed=0)


def test_loads_take_turns_and_the_warm_up_is_discarded(slept: tuple[Sleeper, Timed]) -> None:
    engine, timed = slept
    assert engine.asked == [(1, 6), (4, 6)] * 7
    counts = [("concurrency=1", 1), ("concurrency=4", 4)]
    assert [(s.repeat, s.load) for s in timed.samples] == [
        (repeat, name) for repeat in range(5) for name, users in counts for _ in range(users)
    ]


def test_prompts_are_unique_and_of_one_length(slept: tuple[Sleeper, Timed]) -> None:
    prompts = slept[0].prompts
    assert len(set(prompts)) == len(prompts) == 35
    assert {len(prompt) for prompt in prompts} == {16}


def test_times_are_those_slept(slept: tuple[Sleeper, Timed]) -> None:
    """A sleep never ends early, and a busy machine only makes it longer: bounds and ratios."""
    found = {(m.metric, m.slice): m for m in summary(slept[1].samples)}
    for name, batch in (("concurrency=1", 1), ("concurrency=4", 4)):
        assert found["ttft_ms", name].value >= 1000 * PREFILL
        assert found["itl_ms", name].value >= 1000 * STEP
        assert found["e2e_latency_ms", name].value >= 1000 * (PREFILL + 5 * STEP)
        assert found["prefill_throughput", name].value <= batch * 16 / PREFILL
        assert found["decode_throughput", name].value <= batch / STEP
        assert found["ttft_ms", name].n == 5 * batch
        assert found["itl_ms", name].n == 5 * 5 * batch


def test_repeats_that_differ_are_marked_unstable() -> None:
    steady = Timed([sample((0.1, 0.2 + 0.0001 * i), repeat=i) for i in range(5)], [1.0, 2.0])
    told = speed._conditions(steady, summary(steady.samples))
    assert told == {"load_average": {"lowest": 1.0, "highest": 2.0}, "unstable": []}
    shaky = Timed([sample((0.1, 0.2 + 0.05 * i), repeat=i) for i in range(5)], [1.0])
    assert speed._conditions(shaky, summary(shaky.samples))["unstable"] == ["concurrency=1"]
    cv = next(m for m in summary(shaky.samples) if m.metric == "timing_cv")
    assert cv.value > UNSTABLE_CV


def test_a_request_that_ends_early_is_invalid() -> None:
    driver = EngineDriver(Sleeper(missing=1), WORKLOAD)  # type: ignore[arg-type]
    with pytest.raises(InvalidEngine, match="gave 5 tokens instead of 6"):
        load.timed(driver, WORKLOAD, range(1000), 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output_tokens": 1}, "`workload.output_tokens=1` should be 2 or more"),
        ({"prompt_tokens": 4096}, "`workload=test` takes 4102 tokens, .* has 4096 positions"),
    ],
)
def test_a_workload_that_cannot_be_timed_is_refused(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    make_job: Callable[..., Job],
    changed: dict[str, Any],
    message: str,
) -> None:
    workload = dataclasses.replace(WORKLOAD, **changed)
    with pytest.raises(ValueError, match=message):
        speed.measure(make_job("speed", make_cell(workload=workload), tiny_random))


def test_peak_memory_is_that_allocated() -> None:
    """40 MB that are gone again at the end, after 60 MB that were gone before the start."""
    block = bytearray(60_000_000)
    block[::4096] = b"x" * len(block[::4096])
    del block
    gc.collect()  # what earlier tests left behind must not go while the peak is taken
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    with Peak("cpu") as peak:
        held = bytearray(40_000_000)
        held[::4096] = b"x" * len(held[::4096])
        del held
    assert peak.bytes is not None
    assert 38_000_000 < peak.bytes < 48_000_000


def test_no_peak_where_the_system_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_memory, "_CLEAR", tmp_path / "clear_refs")
    with Peak("cpu") as peak:
        pass
    assert peak.bytes is None


def test_the_stage_measures_a_real_engine(
    tiny_random: Path, make_cell: Callable[..., Cell], make_job: Callable[..., Job]
) -> None:
    bandwidth = Gpu("cpu", "cpu", "", None, 8.0, 1000.0, 1)
    workload = Workload("test", 16, 4, (2,), 2, 5)
    job = make_job("speed", make_cell(gpu=bandwidth, workload=workload), tiny_random)
    result = speed.measure(job)
    codec.dumps(result)
    found = {(m.metric, m.slice): m for m in result.measurements}
    weights = found["resident_weights_bytes", None].value
    loaded = runtime.load(tiny_random, make_cell(), "bfloat16")
    assert weights == loaded.memory().weights_bytes
    assert found["kv_bytes_per_token", None].value == 2 * 2 * 2 * 64 * 2
    assert {name for _, name in found if name} == {"concurrency=1", "concurrency=2"}
    assert found["peak_memory_bytes", None].value > 0
    lines = (Path(job.out) / "samples.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    assert [(each["load"], len(each["arrivals"])) for each in read] == [
        ("concurrency=1", 4),
        ("concurrency=2", 4),
        ("concurrency=2", 4),
    ] * 5
    assert result.observed["compute_dtype"] == "bfloat16"
    assert set(result.observed["load_average"]) == {"lowest", "highest"}
    (check,) = result.checks
    assert (check.name, check.ok, check.fatal) == ("decode_below_bandwidth", True, False)


def test_an_impossible_speed_fails_its_check(make_cell: Callable[..., Cell]) -> None:
    slow = Gpu("x", "cpu", "", None, 8.0, 1e-6, 1)
    measured = summary([sample((0.1, 0.2))])
    (check,) = speed._ceiling(make_cell(gpu=slow), 10_000, measured)
    assert not check.ok
    assert check.expected == "at most 0.1 tok/s at batch 1"


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_an_embedding_table_of_its_own_is_not_read(
    make_cell: Callable[..., Cell], tmp_path: Path, dtype: Any, width: int
) -> None:
    """Of a model that is more than text, too; the table is as wide as the speed dtype."""
    text = {"vocab_size": 100, "hidden_size": 10, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    cell = make_cell(gpu=Gpu("x", "cpu", "", None, 8.0, 1.0, 1))
    cell = dataclasses.replace(cell, runtime=dataclasses.replace(cell.runtime, speed_dtype=dtype))
    measured = summary([sample((0.1, 0.2))])
    unread = speed._unread_bytes(cell, tmp_path, {})
    assert unread == 1000 * width
    (check,) = speed._ceiling(cell, 1000 * width + 1_000_000 - unread, measured)
    assert check.expected == "at most 1000.0 tok/s at batch 1"
    assert speed._unread_bytes(cell, tmp_path, {"unread_table_bytes": 7}) == 7


class Served(Stub):
    """The stub as a runtime's server: it tells what a real one would tell."""

    held: Memory | None = None
    closed = 0

    def memory(self) -> Memory | None:
        return self.held

    def observed(self) -> Mapping[str, Any]:
        return {"device": "stub"}

    def checks(self) -> Sequence[Check]:
        return (Check("told", True, "x", "x"),)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def measured(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[StageResult, Path]]:
    """The speed stage of a cell whose runtime serves requests over HTTP."""

    def stage(server: Served, **changes: Any) -> tuple[StageResult, Path]:
        def serve(artifact: Path, cell: Cell, dtype: str) -> Served:
            assert (artifact, dtype) == (tiny_random, "bfloat16")
            return server

        monkeypatch.setattr(runtime, "serve", serve, raising=False)
        workload = dataclasses.replace(WORKLOAD, **changes)
        gpu = Gpu("cpu", "cpu", "", None, 8.0, 1000.0, 1)
        job = make_job("speed", make_cell(gpu=gpu, workload=workload), tiny_random)
        return speed.measure(job), Path(job.out)

    return stage


def test_the_stage_measures_a_server(measured: Callable[..., tuple[StageResult, Path]]) -> None:
    """What the server's memory is it says itself; that of this process is not it."""
    slo = Slo(ttft_ms=60_000)
    with Served(Clock(0.01, 0.004), own=True) as server:
        server.held = Memory(1000, 10, None, 5000, 300, 7000, 2.5)
        result, out = measured(server, concurrency=(2, 4), rounds=2, slo=slo)
    codec.dumps(result)
    found = {(m.metric, m.slice): m.value for m in result.measurements}
    held = {metric: value for (metric, part), value in found.items() if part is None}
    assert held.pop("busy_elsewhere") >= 0
    assert held.pop("knee_concurrency") in {1, 2, 4}
    assert held == {
        "resident_weights_bytes": 1000,
        "kv_bytes_per_token": 10,
        "kv_pool_bytes": 5000,
        "activation_peak_bytes": 300,
        "reserved_bytes": 7000,
        "max_concurrency": 2.5,
        "max_users": 4,
    }
    assert {name for _, name in found if name} == {f"concurrency={n}" for n in (1, 2, 4)}
    assert found["goodput", "concurrency=4"] == found["request_throughput", "concurrency=4"] > 0
    assert found["failed_requests", "concurrency=4"] == 0
    assert found["client_processors", "concurrency=4"] > 0
    assert [check.name for check in result.checks] == ["told", "decode_below_bandwidth"]
    assert "max_users" in result.observed["at_least"]
    assert (result.observed["device"], result.observed["requests"]) == ("stub", 5 * 2 * (1 + 2 + 4))
    assert len((out / "samples.jsonl").read_text().splitlines()) == 70
    assert server.closed == 1


def test_of_somebody_elses_server_nothing_is_guessed(
    measured: Callable[..., tuple[StageResult, Path]],
) -> None:
    with Served(dataclasses.replace(Clock(0.01, 0.004), tokens=5)) as server:
        result, _ = measured(server)
    found = {m.metric for m in result.measurements if m.slice is None}
    assert found == set()
    assert result.observed["wrong_length"] == 5 * (1 + 4)
    assert [check.name for check in result.checks] == ["told"]


def test_a_server_that_answers_nothing_crashes_the_stage_and_is_closed(
    measured: Callable[..., tuple[StageResult, Path]],
) -> None:
    with Served(status(500, {"error": {"message": "no room"}})) as server:
        with pytest.raises(NothingServed, match="HTTP 500: no room"):
            measured(server)
        assert server.closed == 1


def test_prompts_hold_no_special_token(tiny_random: Path, tmp_path: Path) -> None:
    """Of the random model 0 to 3 are added tokens; beyond its tokenizer nothing is drawn."""
    tokenizer = json.loads((tiny_random / "tokenizer.json").read_text())
    known = set(tokenizer["model"]["vocab"].values())
    ids = vocabulary(tiny_random)
    assert {token["id"] for token in tokenizer["added_tokens"]} == {0, 1, 2, 3}
    assert set(ids) == known - {0, 1, 2, 3}
    assert max(ids) < 512
    bare = {"vocab_size": 10, "eos_token_id": [8, 9], "bos_token_id": 0, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    assert vocabulary(tmp_path) == list(range(1, 8))
    unigram = {"model": {"vocab": [["a", -1.0]] * 12}, "added_tokens": [{"id": 3}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert vocabulary(tmp_path) == [1, 2, 4, 5, 6, 7]
    (tmp_path / "config.json").unlink()
    assert vocabulary(tmp_path) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
