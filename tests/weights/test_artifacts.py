"""The artifact store: built once, never half, and no planted fault gets past its checks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qgrid import codec, registry
from qgrid.contracts import Built
from qgrid.files import HashCache
from qgrid.types import Cell, Check, Job, StageResult
from qgrid.weights import artifacts
from qgrid.weights.artifacts import BadArtifact
from tests import jobs

Plant = Callable[[Path], None]


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, tiny_random: Path, make_cell: Callable[..., Cell]
) -> tuple[Job, StageResult]:
    """A 4-bit artifact of the random model."""
    job = jobs.job(make_cell, tmp_path_factory.mktemp("store"), tiny_random, "rtn", 4)
    return job, artifacts.build(job)


@pytest.fixture
def copy(built: tuple[Job, StageResult], tmp_path: Path) -> Path:
    """The artifact's files, to be spoiled."""
    folder = tmp_path / "copy"
    shutil.copytree(built[0].artifact, folder)
    return folder


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if check.fatal and not check.ok]


# --- building ------------------------------------------------------------------------------------


def test_result_tells_size_bits_and_what_quantized(built: tuple[Job, StageResult]) -> None:
    job, result = built
    values = {m.metric: m.value for m in result.measurements}
    folder = Path(job.artifact)
    listed = [p for p in folder.iterdir() if p.name != artifacts.MANIFEST]
    assert values["size_on_disk_bytes"] == sum(p.stat().st_size for p in listed)
    assert 4.12 < values["linear_bits_per_weight"] < 4.14
    assert values["linear_bits_per_weight"] < values["bits_per_weight"] < 16
    assert result.observed["format"] == "pack-quantized"
    assert result.observed["module_methods"] == {"rtn": 14}
    assert not result.observed["reused"]
    names = [check.name for check in result.checks]
    assert names == [
        "files", "bits", "coverage", "method", "tokenizer", "finite", "ends", "reload",
        "environment",
    ]  # fmt: skip
    assert all(check.ok for check in result.checks)


def test_manifest_holds_what_the_files_hold(built: tuple[Job, StageResult]) -> None:
    job, _ = built
    manifest = artifacts.load_manifest(Path(job.artifact))
    assert manifest.artifact_id == job.planned.artifact_id
    assert manifest.seconds > 0
    assert manifest.peak_memory_bytes
    assert {"llmcompressor", "compressed-tensors", "torch", "transformers"} <= set(
        manifest.versions
    )
    assert set(manifest.files) == set(manifest.sizes)
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= set(
        manifest.files
    )
    assert sum(state.num_weights for state in manifest.modules.values()) > 0


def test_second_build_only_reads(built: tuple[Job, StageResult]) -> None:
    job, first = built
    before = (Path(job.artifact) / "model.safetensors").stat().st_mtime_ns
    again = artifacts.build(job)
    assert again.seconds == {"build": 0.0}
    assert again.observed["reused"]
    assert again.measurements == first.measurements
    assert again.checks == first.checks
    assert (Path(job.artifact) / "model.safetensors").stat().st_mtime_ns == before


def test_result_survives_json(built: tuple[Job, StageResult]) -> None:
    _, result = built
    assert codec.loads(StageResult, codec.dumps(result)) == result


# --- faults at build time ------------------------------------------------------------------------


def spoiled(monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    """Make the real method spoil what it has written."""
    real = registry.method("rtn")

    def quantize(cell: Cell, source: Path, out: Path) -> Built:
        result = real.quantize(cell, source, out)
        plant(out)
        return result

    known = {name: getattr(real, name) for name in dir(real)}
    monkeypatch.setattr(
        registry, "method", lambda _: SimpleNamespace(**known | {"quantize": quantize})
    )


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_weight(folder: Path) -> None:
    jobs.write_float(folder, 0x4120, "norm")  # 10.0


def plants(source: Path) -> dict[str, tuple[str, Plant]]:
    return {
        "truncated": ("files", jobs.truncate),
        "without weights": ("files", drop_weights),
        "unquantized": ("bits", jobs.unquantize(source)),
        "other tokenizer": ("tokenizer", jobs.swap_tokenizer),
        "nan": ("finite", jobs.plant_nan),
        "other weights": ("reload", change_weight),
    }


@pytest.mark.parametrize(
    "fault",
    ["truncated", "without weights", "unquantized", "other tokenizer", "nan", "other weights"],
)
def test_fault_while_building_is_named_and_leaves_nothing(
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
) -> None:
    name, plant = plants(tiny_random)[fault]
    job = jobs.job(make_cell, tmp_path, tiny_random, "rtn", 4)
    spoiled(monkeypatch, plant)
    with pytest.raises(BadArtifact, match=f"check `{name}`") as error:
        artifacts.build(job)
    assert failed(error.value.checks)[0] == name
    assert not artifacts.exists(tmp_path, job.planned.artifact_id)
    assert [p.name for p in (tmp_path / "artifacts").iterdir() if p.is_dir()] == []


# --- faults before use ---------------------------------------------------------------------------


def check(folder: Path, job: Job, tmp_path: Path, full: bool = False) -> tuple[Check, ...]:
    return artifacts.verify(folder, job.planned, HashCache(tmp_path / "hashes.json"), full)


@pytest.mark.parametrize("full", [False, True])
def test_good_artifact_passes(
    copy: Path, built: tuple[Job, StageResult], tmp_path: Path, full: bool
) -> None:
    checks = check(copy, built[0], tmp_path, full)
    assert failed(checks) == []
    assert ("finite" in {c.name for c in checks}) == full


@pytest.mark.parametrize("fault", ["truncated", "without weights", "nan", "other tokenizer"])
def test_changed_file_is_found_with_remembered_hashes(
    fault: str, copy: Path, built: tuple[Job, StageResult], tmp_path: Path, tiny_random: Path
) -> None:
    assert failed(check(copy, built[0], tmp_path)) == []  # now the hashes are remembered
    plants(tiny_random)[fault][1](copy)
    assert failed(check(copy, built[0], tmp_path)) == ["files"]


@pytest.mark.parametrize(
    ("fault", "full"),
    [("truncated", False), ("unquantized", False), ("other tokenizer", False), ("nan", True)],
)
def test_fault_is_found_although_the_manifest_was_rewritten(
    fault: str,
    full: bool,
    copy: Path,
    built: tuple[Job, StageResult],
    tmp_path: Path,
    tiny_random: Path,
) -> None:
    name, plant = plants(tiny_random)[fault]
    plant(copy)
    jobs.rewrite_manifest(copy)
    assert name in failed(check(copy, built[0], tmp_path, full))


@pytest.mark.parametrize(
    "lie",
    [{"artifact_id": "other"}, {"bits": 8}, {"linear_bits_per_weight": 4.0}, {"num_parameters": 1}],
)
def test_lying_manifest_is_found(
    lie: dict[str, Any], copy: Path, built: tuple[Job, StageResult], tmp_path: Path
) -> None:
    jobs.rewrite_manifest(copy, **lie)
    assert failed(check(copy, built[0], tmp_path)) == ["manifest"]


def test_missing_or_torn_manifest_is_no_artifact(
    copy: Path, built: tuple[Job, StageResult], tmp_path: Path
) -> None:
    manifest = copy / artifacts.MANIFEST
    manifest.write_text(manifest.read_text()[:100])
    assert failed(check(copy, built[0], tmp_path)) == ["files"]
    manifest.unlink()
    assert failed(check(copy, built[0], tmp_path)) == ["files"]


def test_weights_that_the_manifest_does_not_list_are_found(
    copy: Path, built: tuple[Job, StageResult], tmp_path: Path
) -> None:
    shutil.copyfile(copy / "model.safetensors", copy / "model-00002.safetensors")
    assert failed(check(copy, built[0], tmp_path)) == ["files"]


def test_layer_left_at_16_bits_fails_coverage(
    copy: Path, built: tuple[Job, StageResult], tmp_path: Path, tiny_random: Path
) -> None:
    from safetensors.torch import load_file, save_file

    layer = "model.layers.0.mlp.down_proj"
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(layer)}
    tensors[f"{layer}.weight"] = load_file(tiny_random / "model.safetensors")[f"{layer}.weight"]
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model.safetensors")
    jobs.rewrite_manifest(copy)
    checks = check(copy, built[0], tmp_path)
    assert "coverage" in failed(checks)
    said = next(c.actual for c in checks if c.name == "coverage")
    assert layer in said
    assert said.startswith("92.9%")


def test_another_installed_version_is_only_noted(
    copy: Path, built: tuple[Job, StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qgrid import environment

    pins = dict(environment.locked_versions("main")) | {"llmcompressor": "0.0.1"}
    monkeypatch.setattr(environment, "locked_versions", lambda *_: pins)
    checks = check(copy, built[0], tmp_path)
    assert failed(checks) == []
    noted = next(c for c in checks if c.name == "environment")
    assert not noted.ok
    assert "llmcompressor" in noted.actual


def test_verifying_imports_no_torch(built: tuple[Job, StageResult], tmp_path: Path) -> None:
    job, _ = built
    (tmp_path / "job.json").write_text(codec.dumps(job))
    code = (
        "import sys, json; from pathlib import Path; from qgrid import codec\n"
        "from qgrid.files import HashCache; from qgrid.types import Job\n"
        "from qgrid.weights import artifacts\n"
        f"job = codec.loads(Job, Path({str(tmp_path / 'job.json')!r}).read_text())\n"
        f"cache = HashCache(Path({str(tmp_path / 'hashes.json')!r}))\n"
        "checks = artifacts.verify(Path(job.artifact), job.planned, cache, full=True)\n"
        "heavy = {'torch', 'transformers', 'llmcompressor', 'bitsandbytes'} & set(sys.modules)\n"
        "print(json.dumps([all(c.ok for c in checks), sorted(heavy)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, []]
