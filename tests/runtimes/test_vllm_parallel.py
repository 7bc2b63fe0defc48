"""A model split over two of vLLM's workers, as on two GPUs: the same rows, and all of its bytes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qgrid import codec, demo
from qgrid.runtimes import _vllm_settings as settings
from qgrid.types import Cell, Gpu
from tests.runtimes import vllm_environment, vllm_models
from tests.runtimes.passes import plain, some_ids
from tests.runtimes.vllm_models import Checkpoint, cell

pytestmark = pytest.mark.slow

PROGRAM = "tests.runtimes.vllm_serving"
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each worker")
LONG = 700  # more rows than one chunk
Rows = list[list[tuple[int, torch.Tensor]]]


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """One of several chunks, and choices of one prompt that share a block of the cache."""
    rng = random.Random(0)
    prompt = some_ids(rng, 300)
    return [some_ids(rng, LONG), *(prompt + some_ids(rng, count) for count in (1, 3))]


@pytest.fixture(scope="module")
def made(make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    found = vllm_models.build(make_cell, "rtn4", tmp_path_factory.mktemp("split"))
    return replace(found, cell=two_threads(found.cell))


def two_threads(cell_: Cell) -> Cell:
    return replace(cell_, runtime=replace(cell_.runtime, threads=2))


@pytest.fixture(scope="module")
def answers(
    make_cell: Callable[..., Cell],
    made: Checkpoint,
    sequences: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("session")
    plain_ = Checkpoint(demo.MODEL_DIR, two_threads(cell(make_cell, "none")))

    def task(name: str, of: Checkpoint, dtype: str, parallel: int) -> dict[str, Any]:
        return {
            "name": name,
            "do": "score",
            "folder": str(of.folder),
            "cell": codec.plain(of.cell),
            "dtype": dtype,
            "parallel": parallel,
            "sequences": sequences,
            "keep": [LONG - 1, 1, 3],
            "more": [{"sequences": sequences, "keep": [LONG, 2, 3], "prefix": [7, 8]}],
            "prompts": [[[sequences[1][:40]], 8]],
        }

    tasks = [
        task("exact", plain_, "float32", 2),
        task("single", made, "bfloat16", 1),
        task("split", made, "bfloat16", 2),
        task("three", plain_, "bfloat16", 3) | {"do": "refused"},
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    out = folder / "answers.pt"
    vllm_environment.run("tests.runtimes.vllm_session", str(folder / "tasks.json"), str(out))
    found: dict[str, Any] = torch.load(out)
    return found


def joined(rows: Rows) -> list[torch.Tensor]:
    return [torch.cat([chunk for _, chunk in chunks]) for chunks in rows]


@TWO_CORES
def test_rows_of_two_workers_are_full_and_those_of_plain_passes(
    answers: dict[str, Any], sequences: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()
    for rows, prefix, keep in (
        (answers["exact"]["rows"], [], [LONG - 1, 1, 3]),
        (answers["exact"]["prefixed"][0], [7, 8], [LONG, 2, 3]),
    ):
        for found, ids, count in zip(joined(rows), sequences, keep, strict=True):
            expected = plain(model, prefix + ids)[-count - 1 : -1]
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) < 2e-3
    assert [start for start, _ in answers["exact"]["rows"][0]] == [1, 513]


@TWO_CORES
def test_quantized_rows_of_two_workers_are_those_of_one(answers: dict[str, Any]) -> None:
    single = torch.cat(joined(answers["single"]["rows"]))
    split = torch.cat(joined(answers["split"]["rows"]))
    divergence = (single.exp() * (single - split)).sum(-1).mean()
    assert 0 < float(divergence) < 2e-4  # sums in another order, in bf16; 4 bits cost 1e-3 and more
    assert len(answers["split"]["made"][0][0][0]) == 8


@TWO_CORES
def test_all_workers_are_counted(answers: dict[str, Any]) -> None:
    single, split = answers["single"]["told"], answers["split"]["told"]
    assert single["observed"]["tensor_parallel_size"] == 1
    assert split["observed"]["tensor_parallel_size"] == 2
    assert split["kernels"] == single["kernels"] == {"CPUWNA16": 20}
    assert split["observed"]["threads"] == 2
    assert len(split["observed"]["cores"]) == 2
    # Norms and the table of rotary angles (4096 x 64, half a MiB) are in both, the rest in halves.
    twice = split["memory"]["weights_bytes"] - single["memory"]["weights_bytes"]
    assert 2**19 <= twice < 1.1 * 2**19
    assert split["memory"]["kv_bytes_per_token"] == single["memory"]["kv_bytes_per_token"]
    assert split["memory"]["kv_pool_bytes"] == pytest.approx(2**28, rel=0.02)  # 0.125 GiB each
    assert split["memory"]["max_concurrency"] == pytest.approx(
        2 * single["memory"]["max_concurrency"], rel=0.02
    )
    assert split["positions"] == single["positions"]
    assert {check["name"] for check in split["checks"]} >= {"tensor_parallel_size", "threads"}
    assert all(check["ok"] for check in split["checks"]), split["checks"]
    assert split["observed"]["stores_in"] == single["observed"]["stores_in"]
    assert answers["split"]["left"] == []
    assert not answers["split"]["sockets_left"]


@TWO_CORES
def test_a_count_that_does_not_divide_the_heads_is_unsupported(answers: dict[str, Any]) -> None:
    told = answers["three"]["ours"]
    assert told.startswith("vLLM cannot run this checkpoint here")
    assert told.endswith("attention heads (4) must be divisible by tensor parallel size (3).")


@TWO_CORES
def test_a_server_counts_all_its_workers(made: Checkpoint, tmp_path: Path) -> None:
    stored = vllm_environment.write_cell(tmp_path, "cell", made.cell)
    out = tmp_path / "seen.json"
    vllm_environment.run(PROGRAM, str(made.folder), stored, str(out), "--split")
    seen = json.loads(out.read_text())
    file = (made.folder / "model.safetensors").stat().st_size
    memory = seen["memory_after"]
    assert 0.9 * file < memory["weights_bytes"] < file + 4 * 2**20
    assert memory["kv_pool_bytes"] == pytest.approx(2**28, rel=0.02)
    assert memory["activation_peak_bytes"] > seen["memory"]["activation_peak_bytes"] >= 0
    assert memory["weights_bytes"] + memory["kv_pool_bytes"] < memory["reserved_bytes"]
    assert seen["observed"]["tensor_parallel_size"] == 2
    assert seen["kernels"] == {"CPUWNA16": 20}
    assert all(check["ok"] for check in seen["checks"]), seen["checks"]
    assert seen["after"] == []


def test_a_pool_of_several_gpus_is_what_each_needs(make_cell: Callable[..., Cell]) -> None:
    def of(count: int) -> int:
        gpu = Gpu("h100", "cuda", "h100", "sm_90", 80.0, 3350.0, count)
        wanted = cell(make_cell, "none", kv_cache_gib=None)
        long = replace(wanted, gpu=gpu, context=2**23)
        assert settings.arguments(demo.MODEL_DIR, long, "bfloat16")["tensor_parallel_size"] == count
        return settings.pool_bytes(demo.MODEL_DIR, long, "bfloat16")

    assert of(2) * 2 == of(1)
    assert of(4) == of(2)  # two heads: each is kept twice
