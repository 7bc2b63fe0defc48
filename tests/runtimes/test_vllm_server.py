"""vLLM's own server as the runtime starts it: what it tells, what it serves, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import demo
from qgrid.types import Cell, Runtime
from tests.runtimes import vllm_environment, vllm_models
from tests.runtimes.passes import plain
from tests.runtimes.vllm_models import Checkpoint, cell
from tests.runtimes.vllm_serving import NEW_TOKENS, members

pytestmark = pytest.mark.slow

PROGRAM = "tests.runtimes.vllm_serving"
ENDING_SECONDS = 60.0


@pytest.fixture(scope="module")
def made(make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return vllm_models.build(make_cell, "rtn4", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def seen(made: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one server said, from its start to its end."""
    return served(made.folder, made.cell, tmp_path_factory.mktemp("seen"))


def served(folder: Path, wanted: Cell, out: Path) -> dict[str, Any]:
    stored = vllm_environment.write_cell(out, "cell", wanted)
    vllm_environment.run(PROGRAM, str(folder), stored, str(out / "seen.json"))
    found: dict[str, Any] = json.loads((out / "seen.json").read_text())
    return found


def test_tokens_are_those_of_the_checkpoint_one_in_a_chunk(
    seen: dict[str, Any], made: Checkpoint
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16).eval()
    prompt = list(range(5, 69))
    first, second = (
        [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]
        for chunks in seen["streams"]
    )
    assert first == second
    assert len(first) == NEW_TOKENS  # the end of a sequence is ignored
    rows = plain(model, prompt + first)[len(prompt) - 1 : -1]
    chosen = rows[range(NEW_TOKENS), first]
    # As likely as the likeliest, up to what bf16 rounds away.
    assert float((rows.max(1).values - chosen).max()) < 0.1


def test_what_computes_is_what_the_worker_process_says(seen: dict[str, Any]) -> None:
    observed = seen["observed"]
    assert seen["kernels"] == {"CPUWNA16": 20}
    assert observed["kernel"] == "CPUWNA16"
    assert observed["stores_in"] == {"int32": 20}
    assert observed["threads"] == 1
    assert observed["cores"] == [min(os.sched_getaffinity(0))]
    assert all(check["ok"] for check in seen["checks"]), seen["checks"]


def test_memory_is_told_apart(seen: dict[str, Any], made: Checkpoint) -> None:
    before, after = seen["memory"], seen["memory_after"]
    file = (made.folder / "model.safetensors").stat().st_size
    assert 0.9 * file < after["weights_bytes"] < file + 3 * 2**20
    assert 0.98 * 2**27 < after["kv_pool_bytes"] <= 2**27
    assert after["activation_peak_bytes"] > before["activation_peak_bytes"] >= 0
    assert after["activation_peak_bytes"] < 2**28
    assert after["weights_bytes"] + after["kv_pool_bytes"] < after["reserved_bytes"]
    assert after["reserved_bytes"] < after["peak_bytes"] < 2**33
    told = 'num_gpu_blocks="'
    blocks = int(seen["metrics"].partition(told)[2].partition('"')[0])
    assert after["max_concurrency"] == blocks / -(-300 // 128)  # blocks of 128 tokens


def test_the_prefix_cache_is_off(seen: dict[str, Any]) -> None:
    assert 'enable_prefix_caching="False"' in seen["metrics"]


def test_nothing_is_left_after_the_end(seen: dict[str, Any]) -> None:
    assert seen["group"] != seen["own_group"]
    assert len(seen["processes"]) >= 4  # guard, server, engine, worker
    assert seen["after"] == []
    assert not Path(seen["folder"]).exists()


def test_a_killed_starter_takes_the_server_with_it(made: Checkpoint, tmp_path: Path) -> None:
    words, variables = vllm_environment.command(PROGRAM)
    stored = vllm_environment.write_cell(tmp_path, "cell", made.cell)
    out = tmp_path / "seen.json"
    starter = subprocess.Popen(
        [*words, str(made.folder), stored, str(out), "--stay"], env=variables
    )
    try:
        deadline = time.monotonic() + vllm_environment.SECONDS
        while not out.exists() and starter.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        found = json.loads(out.read_text())
        assert members(found["group"])
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    deadline = time.monotonic() + ENDING_SECONDS
    while members(found["group"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(found["group"]) == []
    assert not Path(found["folder"]).exists()


def test_a_server_that_cannot_start_says_why(
    make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    wanted = replace(cell(make_cell, "none"), context=100_000)
    found = served(demo.MODEL_DIR, wanted, tmp_path)
    kind, _, message = found["failed"].partition(": ")
    first, _, rest = message.partition("\n")
    assert kind == "ServerFailed"
    assert "ended before it was ready" in first
    assert "max_model_len" in first
    assert rest.count("\n") > 5  # the last lines of its log


def test_what_vllm_has_no_kernel_for_is_unsupported_not_a_crash(
    make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    made = vllm_models.build(make_cell, "rtn8", tmp_path)
    own = made.cell.runtime
    wide = Runtime(own.name, own.dtype, own.speed_dtype, own.threads, own.options)
    words, variables = vllm_environment.command("tests.runtimes.vllm_serving")
    stored = vllm_environment.write_cell(tmp_path, "cell", replace(made.cell, runtime=wide))
    done = subprocess.run(
        [*words, str(made.folder), stored, str(tmp_path / "seen.json")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=vllm_environment.SECONDS,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("qgrid.contracts.Unsupported: vLLM cannot run this checkpoint here")
    assert "Failed to find a kernel" in last
