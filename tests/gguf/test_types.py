"""The tables of types against gguf's, llama.cpp's and published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import gguf
import llama_cpp
import numpy as np
import pytest

from qgrid.gguf import mix
from qgrid.gguf.types import FILE_TYPES, TENSOR_TYPES, Name, named, stored_as
from tests.gguf.bare import Sizes

LLAMA_3_8B = Sizes(
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied=False,
)
DECODABLE = sorted(
    name for name, kind in TENSOR_TYPES.items() if kind.scales and name not in {"TQ1_0", "TQ2_0"}
)


@pytest.mark.parametrize("name", sorted(TENSOR_TYPES))
def test_block_layouts_are_those_of_gguf(name: str) -> None:
    kind = TENSOR_TYPES[name]
    number = gguf.GGMLQuantizationType[name]
    assert (kind.number, kind.block, kind.nbytes) == (number, *gguf.GGML_QUANT_SIZES[number])


@pytest.mark.parametrize("name", DECODABLE)
def test_scales_lie_where_the_table_says(name: str) -> None:
    kind = TENSOR_TYPES[name]
    good = np.ones((1, kind.nbytes), np.uint8)
    for scale in kind.scales:
        good[0, scale : scale + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    assert np.isfinite(gguf.dequantize(good, gguf.GGMLQuantizationType[name])).all()
    for scale in kind.scales:
        bad = good.copy()
        bad[0, scale : scale + 2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
        assert np.isnan(gguf.dequantize(bad, gguf.GGMLQuantizationType[name])).any()


@pytest.mark.parametrize("name", sorted(FILE_TYPES))
def test_file_types_have_llama_cpps_numbers(name: str) -> None:
    assert FILE_TYPES[name].number == getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    assert FILE_TYPES[name].mix <= TENSOR_TYPES.keys()


def test_every_offered_type_is_in_the_table() -> None:
    assert set(get_args(Name)) == FILE_TYPES.keys()


@pytest.mark.parametrize("name", sorted(FILE_TYPES))
def test_bits_per_weight_are_those_of_a_published_model(name: str) -> None:
    kind = FILE_TYPES[name]
    planned: Mapping[str, str] = {
        tensor: mix.meant(kind, mix.Shape(32, 32, 8), tensor, kind.needs_imatrix)
        for tensor in LLAMA_3_8B.linears()
    }
    beside = {"F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "IQ2_XS": "Q5_K"}
    embedding = {"IQ2_XS": "Q2_K"}.get(name, kind.base)
    planned = {
        **planned,
        "output.weight": beside.get(name, "Q6_K"),
        "token_embd.weight": embedding,
    }
    weights = {n: rows * columns for n, (rows, columns) in LLAMA_3_8B.matrices().items()}
    assert kind.bits_per_weight == pytest.approx(mix.bits(planned, weights), abs=0.006)


@pytest.mark.parametrize(
    ("asked", "columns", "stored"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 320, "Q5_0"),
        ("Q6_K", 320, "Q8_0"),
        ("Q4_K", 330, "F16"),
        ("Q8_0", 320, "Q8_0"),
        ("Q8_0", 330, "F16"),
        ("BF16", 330, "BF16"),
    ],
)
def test_rows_that_are_no_whole_blocks_get_another_type(
    asked: str, columns: int, stored: str
) -> None:
    assert stored_as(asked, columns) == stored


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("model.q8_0.gguf", "Q8_0"),
        ("Q6_K.gguf", "Q6_K"),
        ("a-IQ4_XS-v2.gguf", "IQ4_XS"),
        ("from-F16-to-Q2_K.gguf", "Q2_K"),
        ("bf16.gguf", "BF16"),
    ],
)
def test_type_in_a_file_name(file: str, kind: str) -> None:
    found = named(file)
    assert found is not None
    assert found.name == kind


@pytest.mark.parametrize("file", ["model.gguf", "Q4_K_XXL.gguf", "xQ4_0.gguf"])
def test_file_name_without_a_known_type(file: str) -> None:
    assert named(file) is None
