"""Faults planted into checkpoints that look right: each is caught, by the check named for it.

Elsewhere: 16-bit weights named 4-bit, a swapped tokenizer and a layer left out of an artifact
(`weights/test_artifacts.py`); the same of checkpoints that others made
(`methods/test_prequantized_folder.py`, `methods/test_gguf_faults.py`); four-bit integers in whole
bytes (`methods/test_torchao.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.libraries import loading
from qgrid.methods import _checkpoint
from qgrid.types import Cell, StageResult
from qgrid.weights import artifacts
from qgrid.weights.artifacts import BadArtifact
from tests import jobs
from tests.conftest import write_model, write_tokenizer

Build = Callable[..., StageResult]


@pytest.fixture
def build(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Build:
    """Build an artifact: `build("nf4", 4, double_quant=True)`."""

    def run(method: str, bits: int, model: Path = tiny_random, **changes: Any) -> StageResult:
        return artifacts.build(jobs.job(make_cell, tmp_path, model, method, bits, **changes))

    return run


def caught(build: Build, *args: Any, **changes: Any) -> dict[str, str]:
    """The fatal checks that fail, with what they found."""
    with pytest.raises(BadArtifact) as error:
        build(*args, **changes)
    return {c.name: c.actual for c in error.value.checks if c.fatal and not c.ok}


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_bitsandbytes_saved_after_a_forward_pass(
    method: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass repacks weights on a CPU, their scales rounded to bf16, and a reload agrees."""
    assert build(method, 4).observed["module_methods"] == {method: 14}
    load = _checkpoint.load_16bit

    def passed(*args: Any, **arguments: Any) -> Any:
        model = load(*args, **arguments)
        _checkpoint.logits(model, range(8))
        return model

    monkeypatch.setattr(_checkpoint, "load_16bit", passed)
    found = caught(build, method, 4, double_quant=True, keep={"model.layers.1.*": 16})
    assert found.keys() == {"scales"}  # and none of the others
    assert "model.layers.0.mlp.down_proj has scales in bfloat16" in found["scales"]
    plain = caught(build, method, 4, double_quant=False)
    assert "model.layers.0.mlp.down_proj has scales in BF16" in plain["scales"]


def test_another_chat_template(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same vocabulary, same files: prompts would differ from the baseline's."""
    copy = _checkpoint.copy_tokenizer

    def other(source: Path, out: Path) -> None:
        copy(source, out)
        (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    monkeypatch.setattr(_checkpoint, "copy_tokenizer", other)
    assert caught(build, "rtn", 4) == {"tokenizer": "another chat_template"}


def headless(folder: Path) -> Path:
    """A base model that lost its own head, as some conversions leave it."""
    write_model(folder, tie_word_embeddings=False)
    write_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def silently(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """A load that only warns."""
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.mark.parametrize(("method", "bits"), [("rtn", 4), ("nf4", 4)])
def test_base_whose_head_transformers_would_make_up(
    method: str, bits: int, build: Build, tmp_path: Path
) -> None:
    """Random in the model in memory, saved with it, and so the same after a reload."""
    with pytest.raises(InvalidEngine, match=r"finds 1 tensors .* random numbers.*lm_head\.weight"):
        build(method, bits, headless(tmp_path / "headless"))


def test_artifact_whose_head_transformers_would_make_up(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "untied"
    write_model(base, tie_word_embeddings=False)
    write_tokenizer(base)
    copy = _checkpoint.copy_tokenizer

    def behead(source: Path, out: Path) -> None:
        copy(source, out)
        tensors = load_file(out / "model.safetensors")
        del tensors["lm_head.weight"]
        (out / "model.safetensors").unlink()
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(_checkpoint, "copy_tokenizer", behead)
    found = caught(build, "rtn", 4, base)
    assert "lm_head.weight" in found["reload"]


def test_head_that_is_random_in_the_model_and_in_the_file(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader of another library may make it up in silence: memory and reload agree."""
    base = tmp_path / "untied"
    write_model(base, tie_word_embeddings=False)
    write_tokenizer(base)
    load = _checkpoint.load_16bit

    def beheaded(*args: Any, **arguments: Any) -> Any:
        model = load(*args, **arguments)
        torch.nn.init.normal_(model.lm_head.weight, std=0.08)
        return model

    monkeypatch.setattr(_checkpoint, "load_16bit", beheaded)
    assert caught(build, "rtn", 4, base) == {"ends": "lm_head.weight has other values"}
    monkeypatch.setattr(loading, "pretrained", silently)
    found = caught(build, "rtn", 4, headless(tmp_path / "headless"))
    assert found == {"ends": "lm_head.weight is not in the base model"}


def add_head(folder: Path, weight: torch.Tensor | None) -> None:
    """Store a head beside the embedding of a model that shares the two; None: a true copy."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if weight is None else weight.to(embedding)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def test_random_head_beside_a_shared_embedding(
    build: Build, tmp_path: Path, tiny_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers keeps the two apart where they differ, whatever the config says."""
    shape = load_file(tiny_random / "model.safetensors")["model.embed_tokens.weight"].shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    base = Path(shutil.copytree(tiny_random, tmp_path / "base"))
    add_head(base, noise)
    with pytest.raises(InvalidEngine, match="head and embedding are the same matrix, but"):
        build("rtn", 4, base)

    copy = _checkpoint.copy_tokenizer
    given: list[torch.Tensor | None] = [noise, None]

    def with_head(source: Path, out: Path) -> None:
        copy(source, out)
        add_head(out, given.pop(0))

    monkeypatch.setattr(_checkpoint, "copy_tokenizer", with_head)
    found = caught(build, "rtn", 4)
    assert found == {"ends": "lm_head.weight is not the embedding, which the base model's head is"}
    assert all(check.ok for check in build("rtn", 8).checks if check.name in {"ends", "reload"})


def test_layers_to_keep_that_are_not_there(build: Build) -> None:
    """Also where the model was not on this machine when the cell was planned."""
    with pytest.raises(Unsupported, match="matches none of the 14 linear layers"):
        build("nf4", 4, keep={"no.such.layer": 16})


def test_logits_that_are_not_finite(build: Build, tmp_path: Path, tiny_random: Path) -> None:
    """Every stored number is finite, and products of them are not."""
    huge = Path(shutil.copytree(tiny_random, tmp_path / "huge"))
    tensors = load_file(huge / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, huge / "model.safetensors", {"format": "pt"})
    found = caught(build, "rtn", 4, huge)
    assert found.keys() == {"finite_logits"}
    assert "are NaN or infinite" in found["finite_logits"]
