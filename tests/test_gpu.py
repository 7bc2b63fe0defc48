"""The CUDA paths, offline, on the embedded model: `make test-gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qgrid import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.describe().kind != "cuda", reason="no CUDA device on this machine"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("gpu")
    grid = ["-m", "method=none,nf4,int8,rtn,gptq,awq", "bits=4,8", f"out={out}", "tracking=none"]
    done = subprocess.run(
        [sys.executable, "-m", "qgrid", *grid],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(path.read_text()) for path in Path(out).glob("cells/*/record.json")]


def test_every_legal_cell_is_ok(records: list[dict[str, object]]) -> None:
    statuses = sorted(str(record["status"]) for record in records)
    assert statuses == ["ok"] * 9 + ["unsupported"] * 2


def test_the_device_is_the_one_observed(records: list[dict[str, object]]) -> None:
    for record in records:
        if record["status"] == "ok":
            observed = record["observed"]
            assert isinstance(observed, dict)
            assert "cuda" in json.dumps(observed)
