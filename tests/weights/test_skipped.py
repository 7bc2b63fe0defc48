"""Linear layers that an artifact leaves as they were: each with its reason, in few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qgrid.gguf import convert, quantization
from qgrid.types import Cell, Method
from qgrid.weights import inspection, skipped
from tests.conftest import write_model, write_tokenizer

BLOCK = "model.layers.{}.mlp."
BASE = {
    "model.embed_tokens.weight": (8, 16),
    "model.norm.weight": (16,),
    "vision.projector.weight": (16, 16),
    **{f"vision.encoder.layer.{i}.query.weight": (16, 16) for i in range(2)},
    "lm_head.weight": (8, 16),
    **{f"model.layers.{i}.mlp.gate.weight": (4, 16) for i in range(2)},
    **{f"model.layers.{i}.mlp.experts.0.up_proj.weight": (16, 16) for i in range(2)},
}
QUANTIZED = {".weight_packed": (np.int32, (16, 2)), ".weight_scale": (np.float16, (16, 1))}
Make = Callable[..., Cell]


def write(folder: Path, quantized: tuple[str, ...], tied: bool) -> Path:
    """A checkpoint of a mixture of experts, whose layers of these names' ends are packed."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in BASE.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(quantized):
            for part, (dtype, size) in QUANTIZED.items():
                tensors[layer + part] = np.ones(size, dtype)
        elif not (tied and name == "lm_head.weight"):
            tensors[name] = np.ones(shape, np.float16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return folder


@pytest.mark.parametrize(
    ("quantized", "tied", "head"),
    [
        (("up_proj",), False, "the output head, which `rtn` leaves as it is"),
        (("up_proj",), True, "the output head is the embedding, which `rtn` leaves as it is"),
        (("up_proj", "lm_head"), False, None),
    ],
)
def test_head_routers_and_the_rest(
    quantized: tuple[str, ...], tied: bool, head: str | None, make_cell: Make, tmp_path: Path
) -> None:
    source = write(tmp_path / "base", ("nothing",), tied)
    stored = write(tmp_path / "made", quantized, tied)
    cell = make_cell(method=Method("rtn", {"keep": None}), bits=4)
    contents = inspection.inspect(stored, source, "rtn")
    assert set(contents.modules) == {f"model.layers.{i}.mlp.experts.0.up_proj" for i in range(2)}
    expected = {
        "model.layers.*.mlp.gate": "routers of experts, which `rtn` leaves as they are (2)",
        "vision.projector": "no linear layer of the decoder; `rtn` leaves it as it is (1)",
        "vision.encoder.layer.*.query": (
            "no linear layer of the decoder; `rtn` leaves it as it is (2)"
        ),
    }
    told = {} if head is None else {"lm_head": head}
    assert skipped.reasons(cell, contents, source) == {**expected, **told}
    assert skipped.reasons(make_cell(), contents, source) == {}


def test_kept_and_accepted_layers_are_grouped(make_cell: Make, tmp_path: Path) -> None:
    source = write(tmp_path / "base", ("nothing",), tied=False)
    contents = inspection.inspect(source, source, "x")  # both layers at 16 bits
    options = {"keep": {"model.layers.0.*": 16}, "accept_fallback": True}
    told = skipped.reasons(make_cell(method=Method("x", options), bits=4), contents, source)
    assert told["model.layers.0.*"] == "`method.keep` leaves 1 layer at 16 bits"
    assert told["model.layers.*.mlp.experts.*.up_proj"] == (
        "`method.accept_fallback`: 1 layer stored as 16bit"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_head_is_quantized(
    tied: bool, make_cell: Make, tmp_path: Path, tiny_random: Path
) -> None:
    source = tiny_random
    if not tied:
        source = tmp_path / "source"
        source.mkdir()
        write_model(source, tie_word_embeddings=False)
        write_tokenizer(source)
    convert.convert(source, tmp_path / "whole", "BF16")
    quantization.quantize(tmp_path / "whole", tmp_path / "model.gguf", "Q4_K_M")
    (tmp_path / "whole").unlink()
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    contents = inspection.inspect(tmp_path, source, "gguf")
    cell = make_cell(method=Method("gguf", {}), bits=4)
    assert skipped.reasons(cell, contents, source) == {}
