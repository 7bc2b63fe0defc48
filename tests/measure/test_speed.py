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
from qgrid.measure.process_memory import Peak
from qgrid.runtimes import transformers as runtime
from qgrid.timing import UNSTABLE_CV
from qgrid.types import Cell, Gpu, Job, Workload

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
def slept() -> tuple[Sleeper, list[speed.Sample]]:
    engine = Sleeper()
    return engine, speed.timed(engine, WORKLOAD, 1000, seed=0)  # type: ignore[arg-type]


def test_loads_take_turns_and_the_warm_up_is_discarded(
    slept: tuple[Sleeper, list[speed.Sample]],
) -> None:
    engine, samples = slept
    assert engine.asked == [(1, 6), (4, 6)] * 7
    assert [(s.repeat, s.concurrency) for s in samples] == [
        (r, c) for r in range(5) for c in (1, 4)
    ]


def test_prompts_are_unique_and_of_one_length(slept: tuple[Sleeper, list[speed.Sample]]) -> None:
    prompts = slept[0].prompts
    assert len(set(prompts)) == len(prompts) == 35
    assert {len(prompt) for prompt in prompts} == {16}


def test_times_are_those_slept(slept: tuple[Sleeper, list[speed.Sample]]) -> None:
    """A sleep never ends early, and a busy machine only makes it longer: bounds and ratios."""
    found = {(m.metric, m.slice): m for m in speed.summary(slept[1])}
    for load, batch in (("concurrency=1", 1), ("concurrency=4", 4)):
        assert found["ttft_ms", load].value >= 1000 * PREFILL
        assert found["itl_ms", load].value >= 1000 * STEP
        assert found["e2e_latency_ms", load].value >= 1000 * (PREFILL + 5 * STEP)
        assert found["prefill_throughput", load].value <= batch * 16 / PREFILL
        assert found["decode_throughput", load].value <= batch / STEP
        assert found["ttft_ms", load].n == 5 * batch
        assert found["itl_ms", load].n == 5 * 5 * batch


def test_formulas_on_given_times() -> None:
    made = [Generation((1, 2, 3), (0.1, 0.2, 0.4)), Generation((1, 2, 3), (0.1, 0.3, 0.5))]
    one = speed.sample(made, concurrency=2, repeat=0, prompt_tokens=50, began=0.0)
    assert one.prefill_throughput == pytest.approx(2 * 50 / 0.1)
    assert one.decode_throughput == pytest.approx(2 * 2 / 0.4)
    assert one.ttft_ms == pytest.approx([100, 100])
    assert one.itl_ms == pytest.approx([100, 200, 200, 200])
    assert one.tpot_ms == pytest.approx([150, 200])
    assert one.e2e_latency_ms == pytest.approx([400, 500])


def test_tokens_before_the_last_first_one_are_not_decoding() -> None:
    """Two requests by continuous batching: the first decodes while the second is read."""
    made = [
        Generation((1, 2, 3, 4), (0.1, 0.2, 0.3, 0.4)),
        Generation((1, 2, 3, 4), (0.3, 0.4, 0.5, 0.6)),
    ]
    one = speed.sample(made, concurrency=2, repeat=0, prompt_tokens=30, began=0.0)
    assert one.prefill_throughput == pytest.approx(2 * 30 / 0.3)
    assert one.decode_throughput == pytest.approx(4 / 0.3)  # at 0.4 twice, at 0.5 and 0.6
    assert one.ttft_ms == pytest.approx([100, 300])
    assert one.tpot_ms == pytest.approx([100, 100])


def test_repeats_that_differ_are_marked_unstable() -> None:
    def sample(repeat: int, last: float) -> speed.Sample:
        made = [Generation((1, 2), (0.1, last))]
        return speed.sample(made, 1, repeat, 10, 0.0)

    steady = [sample(i, 0.2 + 0.0001 * i) for i in range(5)]
    assert speed._conditions(steady)["unstable"] == []
    shaky = [sample(i, 0.2 + 0.05 * i) for i in range(5)]
    assert speed._conditions(shaky)["unstable"] == ["concurrency=1"]
    cv = next(m for m in speed.summary(shaky) if m.metric == "timing_cv")
    assert cv.value > UNSTABLE_CV


def test_fewer_repeats_than_the_protocol_are_raised() -> None:
    engine = Sleeper()
    hasty = Workload("x", 4, 2, (1,), warmup=0, repeats=1)
    assert len(speed.timed(engine, hasty, 1000, 0)) == 5  # type: ignore[arg-type]
    assert len(engine.asked) == 7


def test_a_request_that_ends_early_is_invalid() -> None:
    with pytest.raises(InvalidEngine, match="gave 5 tokens instead of 6"):
        speed.timed(Sleeper(missing=1), WORKLOAD, 1000, 0)  # type: ignore[arg-type]


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
    assert [json.loads(line)["concurrency"] for line in lines] == [1, 2] * 5
    assert result.observed["compute_dtype"] == "bfloat16"
    assert set(result.observed["load_average"]) == {"lowest", "highest"}
    (check,) = result.checks
    assert (check.name, check.ok, check.fatal) == ("decode_below_bandwidth", True, False)


def test_an_impossible_speed_fails_its_check(make_cell: Callable[..., Cell]) -> None:
    slow = Gpu("x", "cpu", "", None, 8.0, 1e-6, 1)
    measured = speed.summary([speed.sample([Generation((1, 2), (0.1, 0.2))], 1, 0, 4, 0.0)])
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
    measured = speed.summary([speed.sample([Generation((1, 2), (0.1, 0.2))], 1, 0, 4, 0.0)])
    unread = speed._unread_bytes(cell, tmp_path, {})
    assert unread == 1000 * width
    (check,) = speed._ceiling(cell, 1000 * width + 1_000_000 - unread, measured)
    assert check.expected == "at most 1000.0 tok/s at batch 1"
    assert speed._unread_bytes(cell, tmp_path, {"unread_table_bytes": 7}) == 7
