"""The grid of the README in vLLM: made in one environment, scored and served in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from qgrid import environment

pytestmark = pytest.mark.slow

METHODS = ("none", "gptq", "awq", "rtn", "smoothquant", "fp8")
LEGAL = {  # what vLLM has a kernel for on a CPU -> its method and, of quantized layers, the kernel
    ("none", 16): ("UnquantizedLinearMethod", ""),
    ("gptq", 4): ("CompressedTensorsLinearMethod", "CPUWNA16"),
    ("awq", 4): ("CompressedTensorsLinearMethod", "CPUWNA16"),
    ("rtn", 4): ("CompressedTensorsLinearMethod", "CPUWNA16"),
    ("smoothquant", 8): ("CompressedTensorsLinearMethod", "Int8ScaledMM"),
    ("fp8", 8): ("CompressedTensorsLinearMethod", "FP8ScaledMM"),
}
REFUSED = {  # with a word of the reason
    **{
        (method, 8): "vLLM has no cpu kernel for 8-bit weights" for method in ("gptq", "awq", "rtn")
    },
    **{(method, 4): f"method `{method}` has no `bits=4`" for method in ("smoothquant", "fp8")},
}
SMALL = [
    "slices.prose.tokens=2048",
    "workload.prompt_tokens=32",
    "workload.output_tokens=8",
    "workload.concurrency=[2]",
    "calibration.samples=64",
    "tracking=none",
    *(f"~slices.items.{name}" for name in ("long_context", "code", "extraction", "retrieval")),
]
Records = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Every record by method and width."""
    out = tmp_path_factory.mktemp("vllm")
    command = [sys.executable, "-m", "qgrid", "-m", "runtime=vllm", f"method={','.join(METHODS)}"]
    done = subprocess.run(
        [*command, "bits=4,8", *SMALL, f"out={out}"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in out.glob("cells/*/record.json")]
    return {(each["cell"]["method"]["name"], each["cell"]["bits"]): each for each in records}


def value(record: dict[str, Any], metric: str, part: str | None = None) -> float:
    return float(
        next(
            m["value"]
            for m in record["measurements"]
            if (m["metric"], m["slice"]) == (metric, part)
        )
    )


def test_legal_cells_ran_and_the_others_say_why_not(found: Records) -> None:
    assert {key for key, each in found.items() if each["status"] == "ok"} == set(LEGAL)
    refused = {key: each for key, each in found.items() if each["status"] == "unsupported"}
    assert set(refused) == set(REFUSED)
    for key, word in REFUSED.items():
        assert word in refused[key]["error"]["message"]


def test_every_cell_names_the_kernel_of_engine_and_server(found: Records) -> None:
    for key, (method, kernel) in LEGAL.items():
        for stage in ("quality", "speed"):
            seen = found[key]["observed"][stage]
            assert kernel in seen["kernel"], (key, stage)
            assert {each["method"] for each in seen["linear_kernels"]} == {method}
            assert sum(each["modules"] for each in seen["linear_kernels"]) >= 4
        verdicts = {check["name"]: check["ok"] for check in found[key]["checks"]}
        assert verdicts["quantized_linears"]


def test_stages_ran_in_the_environment_of_the_lock(found: Records) -> None:
    pins = environment.locked_versions("vllm", "cpu")
    for key in LEGAL:
        stages = found[key]["environment"]["stages"]
        for stage in ("quality", "speed"):
            assert stages[stage]["environment"] == "vllm"
            assert stages[stage]["versions"]["transformers"] == pins["transformers"]


def test_quality_is_exact_and_grows_worse_with_fewer_bits(found: Records) -> None:
    divergence = {key: value(found[key], "kld_mean") for key in LEGAL if key[1] < 16}
    eight = [divergence["smoothquant", 8], divergence["fp8", 8]]
    four = [divergence[method, 4] for method in ("gptq", "awq", "rtn")]
    assert 0 < max(eight) < min(four)
    assert max(four) < 0.1  # nats: a broken kernel is far above


def test_load_went_through_the_server(found: Records) -> None:
    for key in LEGAL:
        record = found[key]
        assert value(record, "failed_requests", "concurrency=2") == 0
        assert value(record, "output_throughput", "concurrency=2") > 0
        assert value(record, "kv_pool_bytes") > value(record, "kv_bytes_per_token") > 0
        assert value(record, "max_concurrency") >= 1
    four, sixteen = found["gptq", 4], found["none", 16]
    assert value(four, "resident_weights_bytes") < value(sixteen, "resident_weights_bytes")
