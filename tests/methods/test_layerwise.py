"""Checkpoints with their own loader: other architectures, several files, what they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgrid import registry
from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.methods import _checkpoint, _layerwise
from qgrid.types import Cell
from qgrid.weights import artifacts, inspection
from qgrid.weights.artifacts import BadArtifact
from tests import jobs
from tests.conftest import write_model
from tests.methods import decoding

CASES = [("hqq", 3), ("quanto", 4), ("quanto", 8), ("torchao", 8)]


@pytest.fixture
def several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are written in small files, which cut through layers."""
    monkeypatch.setattr(_layerwise, "MAX_FILE_BYTES", 60_000)


@pytest.mark.parametrize(("method", "bits"), CASES)
def test_another_architecture_in_several_files(
    method: str,
    bits: int,
    tmp_path: Path,
    qwen: Path,
    make_cell: Callable[..., Cell],
    several_files: None,
) -> None:
    job = jobs.job(make_cell, tmp_path, qwen, method, bits)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {method: 14}
    folder = Path(job.artifact)
    assert len(inspection.weight_files(folder)) > 3
    bare, whole = inspection.inspect(folder), inspection.inspect(qwen)
    assert (bare.shapes, bare.num_parameters) == (whole.shapes, whole.num_parameters)
    cell = job.planned.cell
    loaded = registry.loader(cell.method)(folder, {"dtype": torch.float32})
    ids = list(range(40))
    found = _checkpoint.logits(loaded, ids)
    reference = _checkpoint.logits(decoding.unquantized(qwen, folder), ids)
    assert found.dtype == torch.float32
    # fp16 embeddings, norms and biases are exact in fp32; torchao adds 4e-8 to scales of its own.
    assert float((found - reference).abs().max()) < 1e-5 * float(reference.abs().max())


@pytest.mark.parametrize(
    ("method", "bits", "changes"),
    [
        ("hqq", 3, {"group_size": 8}),
        ("quanto", 2, {}),
        ("quanto", 4, {}),
        ("quanto", 8, {}),
        ("quanto", 8, {"weights": "float8"}),
        ("torchao", 8, {}),
        ("torchao", 8, {"scheme": "int8_dynamic"}),
    ],
)
def test_sizes_that_kernels_do_not_take(
    method: str,
    bits: int,
    changes: dict[str, Any],
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
) -> None:
    """200 is no multiple of 16: torch refuses such rows of int4, and reads beyond such of int8."""
    folder = tmp_path / "odd"
    write_model(folder, intermediate_size=200, num_hidden_layers=1)
    _checkpoint.copy_tokenizer(tiny_random, folder)
    job = jobs.job(make_cell, tmp_path / "store", folder, method, bits, **changes)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    ids = list(range(40))
    load = registry.loader(job.planned.cell.method)
    reference = _checkpoint.logits(decoding.unquantized(folder, Path(job.artifact)), ids)
    rounded = "int8_dynamic" in changes.values()  # activations too
    for dtype, near in ((torch.bfloat16, 0.1), (torch.float32, 0.1 if rounded else 1e-5)):
        found = _checkpoint.logits(load(Path(job.artifact), {"dtype": dtype}), ids)
        assert float((found - reference).norm()) < near * float(reference.norm())


@pytest.mark.parametrize(("method", "bits"), CASES)
def test_layers_that_are_not_torchs_are_refused(
    method: str, bits: int, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    """Experts of a mixture: separate layers in the file, one tensor in transformers' model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "mixtral"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _checkpoint.copy_tokenizer(tiny_random, folder)
    job = jobs.job(make_cell, tmp_path / "store", folder, method, bits)
    with pytest.raises(
        Unsupported, match=rf"`method={method}` quantizes .* holds 6 layers .*exper"
    ):
        artifacts.build(job)


@pytest.mark.parametrize(("method", "bits"), CASES[:2])
def test_a_file_without_a_tensor_is_not_loaded(
    method: str, bits: int, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, method, bits)
    artifacts.build(job)
    path = Path(job.artifact) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.input_layernorm.weight"]
    path.unlink()
    save_file(tensors, path)
    load = registry.loader(job.planned.cell.method)
    with pytest.raises(InvalidEngine, match=r"holds no model\.layers\.1\.input_layernorm\.weight;"):
        load(Path(job.artifact), {"dtype": "auto"})


@pytest.mark.parametrize(("method", "bits"), CASES[:2])
def test_a_layer_that_is_left_out_is_caught(
    method: str,
    bits: int,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = _layerwise.linears

    def fewer(*arguments: Any) -> dict[str, Any]:
        found = real(*arguments)
        found.pop("model.layers.1.mlp.down_proj")
        return found

    monkeypatch.setattr(_layerwise, "linears", fewer)
    job = jobs.job(make_cell, tmp_path, tiny_random, method, bits)
    with pytest.raises(BadArtifact, match=r"model\.layers\.1\.mlp\.down_proj"):
        artifacts.build(job)


@pytest.mark.parametrize(("method", "bits"), CASES)
def test_a_quantized_source_is_refused(
    method: str, bits: int, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, method, bits)
    artifacts.build(job)
    again = jobs.job(make_cell, tmp_path, Path(job.artifact), method, bits)
    with pytest.raises(Unsupported, match=rf"already quantized \({method}\)"):
        artifacts.build(again)
