"""GGUF cells through the whole way: made, audited, scored and timed on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # from the widest down
SMALL = [
    "slices.prose.tokens=4096",
    "workload.prompt_tokens=32",
    "workload.output_tokens=8",
    "workload.concurrency=[2]",
    "tracking=none",
    *(f"~slices.items.{name}" for name in ("long_context", "code", "extraction", "retrieval")),
]


def qgrid(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qgrid", "-m", "runtime=llama_cpp", *arguments, f"out={out}"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Every record by GGUF type."""
    found = [json.loads(path.read_text()) for path in out.glob("cells/*/record.json")]
    return {record["cell"]["method"]["options"]["type"]: record for record in found}


def value(record: dict[str, Any], metric: str, part: str | None = None) -> dict[str, Any]:
    return next(m for m in record["measurements"] if (m["metric"], m["slice"]) == (metric, part))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    done = qgrid(folder, "method=gguf", f"method.type={','.join(TYPES)}", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_type_is_a_row_beside_its_16_bit_baseline(out: Path) -> None:
    found = records(out)
    assert set(found) == {"F16", *TYPES}
    assert {record["status"] for record in found.values()} == {"ok"}
    assert {record["baseline_cell_id"] for record in found.values()} == {
        None,
        found["F16"]["cell_id"],
    }


def test_divergence_grows_as_bits_fall(out: Path) -> None:
    found = records(out)
    divergence = [value(found[name], "kld_mean")["value"] for name in TYPES]
    size = [value(found[name], "bits_per_weight")["value"] for name in TYPES]
    assert divergence == sorted(divergence)
    assert size == sorted(size, reverse=True)


def test_eight_bits_are_within_the_noise_of_sixteen(out: Path) -> None:
    eight, sixteen = records(out)["Q8_0"], records(out)["F16"]
    ratio = value(eight, "ln_ppl_ratio")
    assert abs(ratio["value"]) < 3 * ratio["stderr"] + 1e-4
    assert value(eight, "kld_mean")["value"] < 1e-3
    assert (
        abs(value(eight, "ppl")["value"] - value(sixteen, "ppl")["value"])
        < (value(sixteen, "ppl")["stderr"])
    )


def test_the_record_says_what_the_file_holds_and_what_ran(out: Path) -> None:
    record = records(out)["Q4_K_M"]
    types = record["artifact"]["tensor_types"]
    assert set(types) == {"F32", "Q4_K", "Q6_K"}
    speed = record["observed"]["speed"]
    assert speed["device_kind"] == "cpu"
    assert set(speed["kernels"]) == {"Q4_K", "Q6_K"}
    assert value(record, "decode_throughput", "concurrency=2")["value"] > 0
    assert (
        value(record, "resident_weights_bytes")["value"]
        < 0.5 * (value(records(out)["F16"], "resident_weights_bytes")["value"])
    )
