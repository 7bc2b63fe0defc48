"""vLLM's own server as the runtime starts it: what it tells, what it serves, how it ends."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import demo
from qgrid.runtimes import _vllm_process
from qgrid.types import Cell
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


@pytest.mark.parametrize("killed", ["starter", "guard"])
def test_what_is_killed_takes_the_server_with_it(
    killed: str, made: Checkpoint, tmp_path: Path
) -> None:
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
        if killed == "guard":
            os.kill(found["group"], signal.SIGKILL)
            assert all_ended(found["group"])
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    assert all_ended(found["group"])
    if killed == "guard":
        shutil.rmtree(found["folder"])  # the starter would have, at its own end
    assert not Path(found["folder"]).exists()


def all_ended(group: int) -> bool:
    deadline = time.monotonic() + ENDING_SECONDS
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return members(group) == []


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


def test_a_pool_without_room_for_one_request_is_unsupported(
    make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    found = served(demo.MODEL_DIR, cell(make_cell, "none", kv_cache_gib=0.0005), tmp_path)
    assert found["failed"].startswith("Unsupported: the KV pool is too small for one request")
    assert found["failed"].count("raise `runtime.kv_cache_gib`") == 1
    assert "\n" not in found["failed"]


def test_a_reserved_port_is_the_servers_alone() -> None:
    """Nobody is given it by chance, and a server that names it can still listen there."""
    held = _vllm_process.reserved_port()
    address = held.getsockname()
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(address)
    with socket.socket() as server, socket.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
        client.connect(address)
        server.accept()[0].close()
    held.close()


def test_the_server_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may name one for everything, this address included."""

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        assert _vllm_process._answers(f"http://127.0.0.1:{server.server_port}/health")
        thread.join()


def test_a_folder_is_not_left_by_what_never_started(
    make_cell: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = cell(make_cell, "none", kv_cache_gib=None)
    with pytest.raises(FileNotFoundError):
        _vllm_process.VllmServer(tmp_path / "nothing", wanted, "bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_what_vllm_has_no_kernel_for_is_unsupported_not_a_crash(
    make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    made = vllm_models.build(make_cell, "rtn8", tmp_path)
    found = served(made.folder, made.cell, tmp_path)
    assert found["failed"].startswith("Unsupported: vLLM cannot run this checkpoint here")
    assert found["failed"].count("vLLM cannot run") == 1
    assert "Failed to find a kernel" in found["failed"]
