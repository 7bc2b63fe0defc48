"""Faults planted into a GGUF artifact: none gets past the checks, whatever the manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qgrid import models
from qgrid.files import HashCache
from qgrid.gguf import convert, file, quantization
from qgrid.methods import gguf
from qgrid.types import Cell, Check, Job
from qgrid.weights import artifacts
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.methods.gguf_jobs import failed, job, options


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of hidden size 320, which no K-quant's block of 256 divides."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder, hidden_size=320)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, tiny_random: Path, make_cell: Callable[..., Cell]
) -> Job:
    made = job(make_cell, tmp_path_factory.mktemp("store"), tiny_random, 4)
    artifacts.build(made)
    return made


def verified(folder: Path, made: Job, tmp_path: Path, full: bool = False) -> tuple[Check, ...]:
    return artifacts.verify(folder, made.planned, HashCache(tmp_path / "hashes.json"), full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_good_file_passes(
    full: bool, with_base: bool, built: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_base:
        monkeypatch.setattr(models, "located", lambda _: None)
    assert failed(verified(Path(built.artifact), built, tmp_path, full)) == []


def test_faults_are_found_although_the_manifest_was_rewritten(
    built: Job, tiny_random: Path, tmp_path: Path
) -> None:
    found = {}
    for fault in ("f16", "renamed", "another mix", "torn", "nan", "scale"):
        folder = planted(fault, built, tiny_random, tmp_path)
        found[fault] = failed(verified(folder, built, tmp_path, full=True))
    assert "types" in found["f16"]
    assert "types" in found["renamed"]
    assert "types" in found["another mix"]
    assert found["torn"] == ["files"]
    assert found["nan"] == found["scale"] == ["finite"]


def planted(fault: str, built: Job, tiny_random: Path, tmp_path: Path) -> Path:
    """A copy of the artifact with a fault that its manifest does not tell."""
    folder = tmp_path / fault.replace(" ", "_")
    shutil.copytree(built.artifact, folder)
    path = folder / "model.gguf"
    if fault == "f16":
        convert.convert(tiny_random, path, "F16")
        restamp(path, 15)
    elif fault == "renamed":
        quantized(tiny_random, path, "Q8_0")
        restamp(path, 15)
    elif fault == "another mix":
        quantized(tiny_random, path, "Q6_K")  # a type that is in the mix of Q4_K_M, but not alone
        restamp(path, 15)
    elif fault == "torn":
        path.write_bytes(path.read_bytes()[:-64])
    else:
        name = "output_norm.weight" if fault == "nan" else "blk.0.ffn_up.weight"
        data = bytearray(path.read_bytes())
        start = file.read(path).tensors[name].start
        nan = np.float32("nan") if fault == "nan" else np.float16("nan")
        data[start : start + nan.nbytes] = nan.tobytes()
        path.write_bytes(data)
    jobs.rewrite_manifest(folder)
    return folder


def quantized(source: Path, path: Path, name: str) -> None:
    whole = path.with_name(".whole")
    convert.convert(source, whole, "BF16")
    quantization.quantize(whole, path, name)
    whole.unlink()


def restamp(path: Path, number: int) -> None:
    """Make the file call itself another type."""
    data = bytearray(path.read_bytes())
    place = data.index(b"general.file_type") + len(b"general.file_type") + 4
    data[place : place + 4] = np.uint32(number).tobytes()
    path.write_bytes(data)


def test_k_quant_of_320_columns_by_the_raw_library_is_found(
    wide: Path, make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    """What the library returns success for: no layer of it is a K-quant of the asked type."""
    made = job(make_cell, tmp_path, wide, 4, type="Q4_0")
    artifacts.build(made)
    quantized(wide, Path(made.artifact) / "model.gguf", "Q4_K_M")
    claims = replace(made.planned.cell.method, options=gguf.resolved(4, options(type="Q4_K_M")))
    (check,) = gguf.checks(Path(made.artifact), replace(made.planned.cell, method=claims))
    assert not check.ok
    assert check.fatal
    assert "model.layers.0.self_attn.q_proj is Q5_0" in check.actual
