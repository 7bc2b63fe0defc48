"""The method `served`: an artifact without weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import environment
from qgrid.files import HashCache
from qgrid.planning.facts import REMOTE
from qgrid.running import assembly
from qgrid.running.launch import Outcome
from qgrid.types import Cell, Gpu, PlannedCell
from qgrid.weights import artifacts
from tests.servers import cells


def built(make: Callable[..., Cell], tiny_random: Path, tmp_path: Path) -> tuple[Any, Any]:
    cell = dataclasses.replace(
        make(), bits=4, model=dataclasses.replace(make().model, id=str(tiny_random))
    )
    folder = tmp_path / "artifacts" / "artifact"
    job = cells.job("artifact", cell, folder, tmp_path / "out")
    return job, artifacts.build(dataclasses.replace(job, artifact=str(folder)))


def test_an_artifact_without_weights_claims_none(
    make: Callable[..., Cell], tiny_random: Path, tmp_path: Path
) -> None:
    job, result = built(make, tiny_random, tmp_path)
    assert result.failure is None
    assert result.measurements == ()
    assert {check.name for check in result.checks} == {"files", "tokenizer"}
    folder = Path(job.artifact)
    assert not list(folder.glob("*.safetensors"))
    manifest = artifacts.load_manifest(folder)
    assert (manifest.format, manifest.bits_per_weight, manifest.num_parameters) == (
        "served",
        None,
        None,
    )
    checks = artifacts.verify(folder, job.planned, HashCache(tmp_path / "hashes.json"), full=True)
    assert [(c.name, c.ok) for c in checks] == [
        ("files", True),
        ("manifest", True),
        ("tokenizer", True),
    ]
    outcome = Outcome(results={"artifact": result}, manifest=manifest)
    here = Gpu("this cpu", "cpu", "", None, 8.0, None, 1)
    planned = dataclasses.replace(
        job.planned, cell=dataclasses.replace(job.planned.cell, gpu=REMOTE)
    )
    record = assembly.measured(planned, outcome, tmp_path, here, environment.momentary())
    assert record.measurements == ()
    assert record.artifact["size_bytes"] is None
    assert record.observed["device"]["name"] == "remote"


def test_a_gpu_that_is_only_stated_is_not_needed(
    make: Callable[..., Cell], tiny_random: Path, tmp_path: Path
) -> None:
    model = dataclasses.replace(make().model, id=str(tiny_random))
    stated = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)
    cell = dataclasses.replace(make(), model=model, gpu=stated)
    folder = tmp_path / "artifacts" / "artifact"
    result = artifacts.build(cells.job("artifact", cell, folder, tmp_path / "out"))
    assert result.failure is None
    assert (folder / "tokenizer.json").is_file()


def test_of_a_hub_model_no_weights_are_fetched(
    make: Callable[..., Cell],
    tiny_random: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[str] = []

    def hub(repository: str, **more: Any) -> str:
        if more["local_files_only"]:
            raise LocalEntryNotFoundError("not in the cache")
        for path in tiny_random.iterdir():
            if any(path.match(pattern) for pattern in more["allow_patterns"]):
                asked.append(path.name)
                shutil.copyfile(path, Path(more["local_dir"]) / path.name)
        return str(more["local_dir"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    cell = make()
    far = dataclasses.replace(cell, model=dataclasses.replace(cell.model, id="org/far"))
    folder = tmp_path / "artifacts" / "artifact"
    job = cells.job("artifact", far, folder, tmp_path / "out")
    result = artifacts.build(dataclasses.replace(job, artifact=str(folder)))
    assert result.failure is None
    assert "tokenizer.json" in asked and "config.json" in asked
    assert not [name for name in asked if "safetensors" in name]
    checks = artifacts.verify(folder, job.planned, HashCache(tmp_path / "hashes.json"))
    assert all(check.ok for check in checks)


def test_an_artifact_without_weights_is_checked_all_the_same(
    make: Callable[..., Cell], tiny_random: Path, tmp_path: Path
) -> None:
    job, _ = built(make, tiny_random, tmp_path)
    folder = Path(job.artifact)

    def failed(planned: PlannedCell = job.planned) -> set[str]:
        cache = HashCache(tmp_path / "hashes.json")
        found = artifacts.verify(folder, planned, cache, full=True)
        return {check.name for check in found if not check.ok}

    assert failed() == set()
    other = dataclasses.replace(job.planned, cell=dataclasses.replace(job.planned.cell, bits=8))
    assert failed(other) == {"manifest"}
    (folder / "model.safetensors").write_bytes(b"weights")
    assert failed() == {"files"}
    (folder / "model.safetensors").unlink()
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["red"] = 3
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert failed() == {"files", "tokenizer"}
