"""The whole way on the embedded model: a grid runs, is not run twice, and mends what is missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMALL = [
    "context=256",
    "slices.prose.tokens=2048",
    "workload.prompt_tokens=32",
    "workload.output_tokens=8",
    "workload.concurrency=[1]",
    "workload.repeats=5",
    "tracking=none",
    *(f"~slices.items.{name}" for name in ("long_context", "code", "extraction", "retrieval")),
]


def qgrid(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qgrid", "-m", *arguments, *SMALL, f"out={out}"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
    )


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Every record by method and bits."""
    found = [json.loads(path.read_text()) for path in out.glob("cells/*/record.json")]
    return {f"{r['cell']['method']['name']}{r['cell']['bits']}": r for r in found}


def stamps(out: Path, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.glob(pattern)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("grid")
    done = qgrid(folder, "method=awq,gptq", "bits=4,8", "name=first")
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder


def test_the_readme_grid_gives_four_cells_beside_their_baseline(out: Path) -> None:
    found = records(out)
    assert set(found) == {"none16", "awq4", "awq8", "gptq4", "gptq8"}
    assert all(record["status"] == "ok" for record in found.values())
    for record in found.values():
        assert record["checks"]
        assert all(check["ok"] for check in record["checks"] if check["fatal"])


def test_stored_bits_are_what_was_asked(out: Path) -> None:
    for name, record in records(out).items():
        stored = metric(record, "linear_bits_per_weight")
        asked = record["cell"]["bits"]
        assert asked <= stored < asked + 0.5, name


def test_a_record_tells_what_is_stored_and_what_is_held(out: Path) -> None:
    """Packed weights unpack at the first pass: the file shrinks, the memory does not."""
    found = records(out)
    rows = {row["cell_id"]: row for row in csv.DictReader(_table(out).open())}
    stored, held = "size_on_disk_bytes", "resident_weights_bytes"
    for name, record in found.items():
        assert metric(record, held) >= metric(found["none16"], held)
        assert (metric(record, stored) < metric(found["none16"], stored)) == (name != "none16")
        row = rows[record["cell_id"]]
        assert row["decompressed"] == str(name != "none16")
        for key in (stored, held):
            assert float(row[f"{key} [bytes]"]) == metric(record, key)


def _table(out: Path) -> Path:
    return out / "sweeps" / "first" / "table.csv"


def test_fewer_bits_move_the_model_further(out: Path) -> None:
    found = records(out)
    for method in ("awq", "gptq"):
        wide, narrow = (metric(found[f"{method}{bits}"], "kld_mean") for bits in (8, 4))
        assert 0 < wide < narrow


def metric(record: dict[str, Any], name: str) -> float:
    return float(next(m["value"] for m in record["measurements"] if m["metric"] == name))


def test_the_sweep_ends_in_tables(out: Path) -> None:
    folder = out / "sweeps" / "first"
    assert "awq" in (folder / "table.md").read_text()
    rows = list(csv.DictReader(_table(out).open()))
    assert len(rows) == 5
    html = (folder / "report.html").read_text()
    assert "parcoords" in html
    assert 'src="http' not in html


def test_a_second_run_does_nothing(out: Path) -> None:
    before = stamps(out, "*/*/*.json") | stamps(out, "cells/*/*/*.json")
    done = qgrid(out, "method=awq,gptq", "bits=4,8", "name=first")
    assert done.returncode == 0
    after = stamps(out, "*/*/*.json") | stamps(out, "cells/*/*/*.json")
    changed = {path for path in after if before.get(path) != after[path]}
    assert not {path for path in changed if "/sweeps/" not in path}


def test_a_deleted_record_is_timed_again_and_its_quality_reused(out: Path) -> None:
    victim = records(out)["gptq4"]["cell_id"]
    quality = stamps(out, "quality/*/result.json")
    artifacts = stamps(out, "artifacts/*/manifest.json")
    speeds = stamps(out, "cells/*/speed/result.json")
    (out / "cells" / victim / "record.json").unlink()
    assert qgrid(out, "method=awq,gptq", "bits=4,8", "name=first").returncode == 0
    assert stamps(out, "quality/*/result.json") == quality
    assert stamps(out, "artifacts/*/manifest.json") == artifacts
    again = stamps(out, "cells/*/speed/result.json")
    assert [Path(p).parts[-3] for p in again if again[p] != speeds[p]] == [victim]
    assert records(out)["gptq4"]["status"] == "ok"


def test_another_workload_measures_speed_and_not_quality(out: Path) -> None:
    quality = stamps(out, "quality/*/result.json")
    done = qgrid(out, "method=gptq", "bits=8", "workload.warmup=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert stamps(out, "quality/*/result.json") == quality
    assert len(list(out.glob("cells/*/record.json"))) == 7


def test_a_truncated_artifact_is_never_scored(out: Path) -> None:
    victim = records(out)["awq8"]
    weights = out / "artifacts" / victim["artifact_id"] / "model.safetensors"
    whole = weights.read_bytes()
    (out / "cells" / victim["cell_id"] / "record.json").unlink()
    weights.write_bytes(whole[:-100])
    done = qgrid(out, "method=awq", "bits=8")
    assert done.returncode == 1
    record = json.loads((out / "cells" / victim["cell_id"] / "record.json").read_text())
    assert record["status"] == "bad_artifact"
    assert "files" in record["error"]["message"]
    assert not [m for m in record["measurements"] if m["metric"] == "accuracy"]
    weights.write_bytes(whole)
    assert qgrid(out, "method=awq", "bits=8").returncode == 0
