"""The vLLM runtime in this process, against plain forward passes of transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qgrid import codec, demo, registry
from qgrid.planning import legality
from qgrid.runtimes import vllm as runtime
from qgrid.runtimes._batches import CHUNK_ROWS
from qgrid.types import Cell, Gpu, KvCache, Method, Runtime
from tests import jobs
from tests.runtimes import vllm_environment, vllm_models
from tests.runtimes.passes import Ids, plain, some_ids
from tests.runtimes.rounding import FP8_LEVELS, INT8_LEVELS, rounded_model
from tests.runtimes.vllm_models import FOUR_BITS, LOADED, REFUSED, Checkpoint, cell

pytestmark = pytest.mark.slow

WINDOW, WINDOWS = 300, 4
EIGHT = KvCache("fp8", 8)
Made = dict[str, Checkpoint]


@pytest.fixture(scope="module")
def made(make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory) -> Made:
    store = tmp_path_factory.mktemp("vllm")
    return {name: vllm_models.build(make_cell, name, store) for name in vllm_models.MADE}


@pytest.fixture(scope="module")
def windows() -> list[Ids]:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    ids = tokenizer(vllm_models.demo_prose()[:20_000], add_special_tokens=False).input_ids
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]


@pytest.fixture(scope="module")
def sequences() -> list[Ids]:
    """Of many lengths, three choices of one prompt, one longer than a chunk and than a step.

    The last two are equal, and rows are wanted that lie in a block of the cache that they share.
    """
    rng = random.Random(0)
    prompt = some_ids(rng, 300)
    short = [some_ids(rng, rng.randrange(2, 60)) for _ in range(20)]
    choices = [prompt + some_ids(rng, count) for count in (1, 3, 2)]
    return [*short, *choices, some_ids(rng, 1300), some_ids(rng, 7), *[prompt[:260]] * 2]


def keeps(sequences: list[Ids], more: int) -> list[int]:
    """Rows of each; all of the long one. `more` is 1 where a prefix gives the first a context."""
    rng = random.Random(1)
    keep = [rng.randrange(1, len(ids) + more) for ids in sequences]
    keep[20:23], keep[23] = [1, 3, 2], len(sequences[23]) - 1 + more
    keep[25:] = [10, 10]
    return keep


# GiB of the KV pool: a block of 128 tokens takes 0.0003; the context is 300 tokens.
SMALL_POOLS = {"no_block": 0.0001, "short": 0.0007}
PREFIXES = (1, 2, 70, 300)  # the last is longer than a block of the cache


@pytest.fixture(scope="module")
def answers(
    made: Made,
    windows: list[Ids],
    sequences: list[Ids],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Everything that these tests ask of vLLM, in one process there."""
    folder = tmp_path_factory.mktemp("session")
    prose = {"sequences": windows, "keep": [WINDOW - 1] * WINDOWS}

    def task(name: str, do: str, of: str, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
        cell_ = more.pop("cell", made[of].cell)
        return {
            "name": name,
            "do": do,
            "folder": str(made[of].folder),
            "cell": codec.plain(cell_),
            "dtype": dtype,
            **prose,
            **more,
        }

    narrow = replace_options(made["none"].cell, max_num_batched_tokens=256)
    tasks = [
        task(
            "exact",
            "score",
            "none",
            "float32",
            cell=narrow,
            sequences=sequences,
            keep=keeps(sequences, 0),
            more=[
                {
                    "sequences": sequences,
                    "keep": keeps(sequences, 1),
                    "prefix": some_ids(random.Random(3), length),
                }
                for length in PREFIXES
            ],
            prompts=[
                [[ids[:40] for ids in windows], 12],
                [[windows[0][:40]], 12, [stop_of(windows[0][:40])]],
            ],
        ),
        *(task(name, "score", name) for name in LOADED if name not in {"none", "rtn4"}),
        task("none", "score", "none", others=[codec.plain(made["rtn4"].cell)]),
        task(
            "rtn4",
            "score",
            "rtn4",
            others=[
                codec.plain(made["none"].cell),
                codec.plain(replace_options(made["rtn4"].cell, kernel="w4a8")),
                codec.plain(replace(made["rtn4"].cell, kv_cache=EIGHT)),
            ],
        ),
        task("kv8", "score", "none", cell=replace(made["none"].cell, kv_cache=EIGHT)),
        task("smoothquant32", "score", "smoothquant", "float32"),
        task("fp8_32", "score", "fp8", "float32"),
        task(
            "together",
            "together",
            "none",
            folders=[str(made["none"].folder), str(made["rtn4"].folder)],
        ),
        *(task(name, "refused", name) for name in REFUSED),
        task("rtn4_32", "refused", "rtn4", "float32"),
        *(
            task(name, "refused", "none", cell=replace_options(made["none"].cell, kv_cache_gib=gib))
            for name, gib in SMALL_POOLS.items()
        ),
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    out = folder / "answers.pt"
    vllm_environment.run("tests.runtimes.vllm_session", str(folder / "tasks.json"), str(out))
    found: dict[str, Any] = torch.load(out)
    return found


def stop_of(prompt: Ids) -> int:
    """The fifth token of the greedy continuation."""
    return greedy(exact_model(), prompt, 5)[-1]


def exact_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()


def greedy(model: Any, prompt: Ids, count: int) -> Ids:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(plain(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def replace_options(cell_: Cell, **options: Any) -> Cell:
    own = cell_.runtime
    return replace(cell_, runtime=replace(own, options={**own.options, **options}))


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    yield exact_model()


def joined(chunks: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The rows of one sequence; every chunk must begin where the one before ended."""
    end = chunks[0][0]
    for start, rows in chunks:
        assert start == end
        assert 1 <= len(rows) <= CHUNK_ROWS
        end = start + len(rows)
    return torch.cat([rows for _, rows in chunks])


def furthest(
    model: Any, rows: list[Any], sequences: list[Ids], keep: list[int], prefix: Ids
) -> float:
    """The largest difference from plain forward passes in float32."""
    worst = 0.0
    for chunks, ids, count in zip(rows, sequences, keep, strict=True):
        assert chunks[0][0] == len(ids) - count
        found = joined(chunks)
        expected = plain(model, prefix + ids)[-count - 1 : -1]
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        worst = max(worst, float((found - expected).abs().max()))
    return worst


def test_float32_rows_equal_plain_forward_passes(
    answers: dict[str, Any], model: Any, sequences: list[Ids]
) -> None:
    """Several requests in a step, prompts cut over steps, beginnings read from the cache."""
    found = answers["exact"]
    assert furthest(model, found["rows"], sequences, keeps(sequences, 0), []) <= 2e-4
    for length, rows in zip(PREFIXES, found["prefixed"], strict=True):
        prefix = some_ids(random.Random(3), length)
        assert furthest(model, rows, sequences, keeps(sequences, 1), prefix) <= 2e-4


def test_generation_is_greedy_and_timed(
    answers: dict[str, Any], model: Any, windows: list[Ids]
) -> None:
    all_, stopped = answers["exact"]["made"]
    for prompt, (ids, seconds) in zip((ids[:40] for ids in windows), all_, strict=True):
        assert list(ids) == greedy(model, prompt, 12)
        assert len(seconds) == 12
        assert 0 < seconds[0] < seconds[-1]
        assert list(seconds) == sorted(seconds)
    assert list(stopped[0][0]) == greedy(model, windows[0][:40], 12)[:4]


def of_transformers(folder: Path, windows: list[Ids], dtype: str) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return torch.stack([plain(loaded, ids)[:-1] for ids in windows])


def of_vllm(found: dict[str, Any]) -> torch.Tensor:
    return torch.stack([joined(chunks) for chunks in found["rows"]])


def mean_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


def divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    return float((base.exp() * (base - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def noise(windows: list[Ids]) -> tuple[float, float]:
    """What bf16 arithmetic alone does: transformers in bf16 against float32, on the same text.

    Mean absolute difference of log-probabilities, and KL divergence.
    """
    wide = of_transformers(demo.MODEL_DIR, windows, "float32")
    narrow = of_transformers(demo.MODEL_DIR, windows, "bfloat16")
    return mean_difference(wide, narrow), divergence(wide, narrow)


def test_16_bits_agree_with_transformers_within_bf16_noise(
    answers: dict[str, Any], windows: list[Ids], noise: tuple[float, float]
) -> None:
    """Two independent bf16 computations are at most sqrt(2) as far apart as each from float32."""
    found = of_vllm(answers["none"])
    expected = of_transformers(demo.MODEL_DIR, windows, "bfloat16")
    assert mean_difference(found, expected) <= 1.4 * noise[0]
    assert divergence(expected, found) <= 2 * noise[1]


@pytest.mark.parametrize("name", FOUR_BITS)
def test_4_bits_agree_with_transformers_on_the_same_checkpoint(
    name: str, answers: dict[str, Any], made: Made, windows: list[Ids], noise: tuple[float, float]
) -> None:
    found = of_vllm(answers[name])
    expected = of_transformers(made[name].folder, windows, "bfloat16")
    plain_ = of_vllm(answers["none"])
    assert mean_difference(found, expected) <= 1.4 * noise[0]
    assert divergence(expected, found) <= 2 * noise[1]
    assert divergence(plain_, found) > 10 * divergence(expected, found)  # it is quantized


@pytest.mark.parametrize(
    ("name", "levels"), [("smoothquant", INT8_LEVELS), ("fp8", FP8_LEVELS)], ids=["int8", "fp8"]
)
def test_8_bit_activations_are_rounded_as_documented(
    name: str, levels: float, answers: dict[str, Any], made: Made, windows: list[Ids]
) -> None:
    """An own computation of W8A8 is as near to vLLM as to itself after a push of one millionth.

    Rounding is a step: a value on its edge falls to the other side, and later layers multiply it.
    """
    found = of_vllm(answers[{"smoothquant": "smoothquant32", "fp8": "fp8_32"}[name]])
    own = rounded_model(made[name].folder, levels)
    pushed = rounded_model(made[name].folder, levels, push=1e-6)
    expected = torch.stack([plain(own, ids)[:-1] for ids in windows])
    neighbour = torch.stack([plain(pushed, ids)[:-1] for ids in windows])
    assert divergence(expected, found) <= 1.5 * divergence(expected, neighbour)
    assert divergence(of_vllm(answers["none"]), found) > divergence(expected, found)
    if levels == INT8_LEVELS:  # what compressed-tensors takes in transformers: 255 / 2
        other = rounded_model(made[name].folder, 127.5)
        apart = divergence(torch.stack([plain(other, ids)[:-1] for ids in windows]), found)
        assert apart > 1.5 * divergence(expected, found)


@pytest.mark.parametrize("name", LOADED)
def test_the_kernel_of_every_layer_is_recorded(
    name: str, answers: dict[str, Any], made: Made
) -> None:
    told = answers[name]["told"]
    observed = told["observed"]
    bits = made[name].cell.bits
    assert sum(row["modules"] for row in observed["linear_kernels"]) == 20  # 4 fused ones a layer
    assert told["kernels"] == {observed["kernel"]: 20}
    expected = {16: "oneDNN", 4: "CPUWNA16"}.get(bits)
    if name == "smoothquant":
        expected = "CPUInt8ScaledMM"
    if name == "fp8":
        expected = "FP8ScaledMM"
    assert expected is not None
    assert expected in observed["kernel"]
    stored = {"smoothquant": "int8", "fp8": "float8_e4m3fn", "none": "bfloat16"}
    assert observed["stores_in"] == {stored.get(name, "int32"): 20}
    assert all(check["ok"] for check in told["checks"]), told["checks"]
    assert observed["threads"] == 1


def test_what_is_not_as_asked_fails_its_check(answers: dict[str, Any]) -> None:
    (claimed,) = answers["none"]["other_checks"]
    plain_claim, other_kernel, other_cache = answers["rtn4"]["other_checks"]

    def failed(checks: list[dict[str, Any]]) -> dict[str, bool]:
        return {check["name"]: check["fatal"] for check in checks if not check["ok"]}

    assert failed(claimed) == {"quantized_linears": True}
    assert failed(plain_claim) == {"quantized_linears": True}
    assert failed(other_kernel) == {"kernel": True}
    assert failed(other_cache) == {"kv_dtype": True}


def test_memory_is_the_pool_and_the_weights(answers: dict[str, Any], made: Made) -> None:
    for name in ("none", "rtn4"):
        memory = answers[name]["told"]["memory"]
        file = (made[name].folder / "model.safetensors").stat().st_size
        # Beside the file: the tied head's copies, and a table of rotary angles.
        assert 0.95 * file < memory["weights_bytes"] < file + 3 * 2**20
        assert memory["kv_bytes_per_token"] == 2 * 5 * 2 * 64 * 2
        assert 0.98 * 2**27 < memory["kv_pool_bytes"] <= 2**27
        tokens = memory["kv_pool_bytes"] / memory["kv_bytes_per_token"]
        assert 0.75 * tokens / 300 < memory["max_concurrency"] < tokens / 300
    assert answers["none"]["told"]["positions"] == 4096


def test_an_8_bit_cache_holds_twice_as_much_and_changes_numbers(answers: dict[str, Any]) -> None:
    wide, narrow = answers["none"]["told"], answers["kv8"]["told"]
    assert narrow["observed"]["kv_dtype"] == "fp8_e4m3"
    assert narrow["memory"]["kv_bytes_per_token"] * 2 == wide["memory"]["kv_bytes_per_token"]
    assert narrow["memory"]["max_concurrency"] == pytest.approx(
        2 * wide["memory"]["max_concurrency"], rel=0.01
    )
    assert all(check["ok"] for check in narrow["checks"])
    apart = divergence(of_vllm(answers["none"]), of_vllm(answers["kv8"]))
    assert 1e-4 < apart < 1e-2


def test_engines_take_turns_and_outlive_each_other(answers: dict[str, Any]) -> None:
    found = answers["together"]
    alone = torch.cat([joined(chunks) for chunks in found["alone"]])
    assert torch.equal(alone, torch.cat([one for one, _ in found["turns"]]))
    assert torch.equal(alone, torch.cat([joined(chunks) for chunks in found["after"]]))
    other = torch.cat([other for _, other in found["turns"]])
    assert not torch.equal(alone, other)
    assert torch.equal(other, torch.cat([joined(chunks) for chunks in found["last"]]))


@pytest.mark.parametrize("name", [*REFUSED, "rtn4_32"])
def test_what_is_refused_does_not_run(name: str, answers: dict[str, Any], made: Made) -> None:
    """vLLM itself gives no engine that computes; the plan says why before any work."""
    assert answers[name]["theirs"], f"vLLM runs `{name}` now: declare it"
    of = made[name.removesuffix("_32")].cell
    if name.endswith("_32"):
        of = replace(of, runtime=replace(of.runtime, dtype="float32"))
    told = runtime.refusal(of)
    assert told is not None
    assert told.count(". ") == 0
    if name in {"fp8_static", "gptq4_zeros"}:
        assert told == answers[name]["ours"]  # a checkpoint of unknown options, just so


@pytest.mark.parametrize("name", SMALL_POOLS)
def test_a_pool_that_is_too_small_is_unsupported(name: str, answers: dict[str, Any]) -> None:
    told = answers[name]["ours"]
    assert told.startswith("the KV pool ")
    assert "raise `runtime.kv_cache_gib" in told


@pytest.mark.parametrize("name", LOADED)
def test_what_loads_is_legal(name: str, make_cell: Callable[..., Cell]) -> None:
    wanted = cell(make_cell, name)
    support = registry.support(wanted.method)
    loads = runtime.LOADS.loads["cpu"]
    assert support.produces[wanted.bits] in loads
    assert runtime.refusal(wanted) is None
    assert legality._refused_options(wanted) is None


def test_a_layer_of_another_width_needs_a_kernel_too(make_cell: Callable[..., Cell]) -> None:
    method = Method("rtn", jobs.options("rtn", keep={"model.layers.0.*": 8}))
    wanted = make_cell(method=method, bits=4, runtime=cell(make_cell, "rtn4").runtime)
    assert "no cpu kernel for 8-bit weights" in str(runtime.refusal(wanted))
    kept = {**method.options, "keep": {"model.layers.0.*": 16}}
    assert runtime.refusal(replace(wanted, method=Method("rtn", kept))) is None


H100 = Gpu("h100", "cuda", "h100", "sm_90", 80.0, 3350.0, 1)


@pytest.mark.parametrize(
    ("name", "changes", "options", "told"),
    [
        ("rtn4", {}, {"kernel": "w4a8"}, "AMX"),
        ("rtn4", {}, {"kernel": "marlin"}, "has: auto, w4a8"),
        ("fp8", {}, {"kernel": "w4a8"}, "4-bit weights"),
        ("none", {}, {"kernel": "w4a8"}, "quantized layers"),
        ("rtn4", {"gpu": H100}, {"kernel": "w4a8"}, "has: auto, cutlass"),
        ("rtn3", {"gpu": H100}, {}, "3-bit"),
        ("gptq4_zeros", {"gpu": H100}, {}, "zero points"),
    ],
)
def test_refusals_say_why(
    name: str,
    changes: dict[str, Any],
    options: dict[str, Any],
    told: str,
    make_cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qgrid.device.cpu_fields", lambda: {"flags": "avx2 avx512f"})
    reason = runtime.refusal(replace(cell(make_cell, name, **options), **changes))
    assert reason is not None
    assert told in reason


def test_half_precision_on_a_cpu_is_refused(make_cell: Callable[..., Cell]) -> None:
    wanted = cell(make_cell, "none")
    half = Runtime("vllm", "bfloat16", "float16", 1, wanted.runtime.options)
    told = runtime.refusal(replace(wanted, runtime=half))
    assert told is not None
    assert "`runtime.speed_dtype=float16`" in told
    assert runtime.refusal(replace(wanted, runtime=half, gpu=H100)) is None


def test_quality_does_not_depend_on_how_much_a_server_sets_aside(
    make_cell: Callable[..., Cell],
) -> None:
    one, other = (
        runtime.quality_options(cell(make_cell, "none", kv_cache_gib=size).runtime.options)
        for size in (1.0, 2.0)
    )
    assert one == other == {"kernel": "auto", "max_num_batched_tokens": None}
