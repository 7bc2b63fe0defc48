"""A file with one tensor less, more or otherwise than its base, which llama.cpp would load."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from qgrid.gguf import convert, quantization
from qgrid.gguf.base_tensors import check_shapes, check_weights
from tests.conftest import write_model, write_tokenizer
from tests.gguf import checkpoints
from tests.gguf.rewriting import Tensors, rewritten

PARTS = [
    (layer, part, 512 if part == "ffn_down" else 256)
    for layer in range(2)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
]


@pytest.fixture(scope="module")
def files(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for variant, source in made.items():
        convert.convert(source, folder / variant, "F16")
    return {variant: folder / variant for variant in made}


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_own_file_has_the_tensors_of_its_base(
    variant: str, files: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    quantization.quantize(files[variant], tmp_path / "q.gguf", "Q8_0")
    for file in (files[variant], tmp_path / "q.gguf"):
        assert check_shapes(file, made[variant]).ok
        assert check_weights(file, made[variant]).ok


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def add_bias(tensors: Tensors) -> None:
    tensors["blk.1.ffn_up.bias"] = (np.ones(96, np.float32), GGMLQuantizationType.F32)


def more_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("blk.1.")]:
        tensors[name.replace("blk.1.", "blk.2.")] = tensors[name]


def turn(tensors: Tensors) -> None:
    data, kind = tensors["blk.0.ffn_gate.weight"]
    tensors["blk.0.ffn_gate.weight"] = (np.ascontiguousarray(data.T), kind)


SHAPES: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "head": ("llama", drop("output.weight"), "output.weight is missing"),
    "bias": ("qwen2 theta", drop("blk.1.attn_k.bias"), "blk.1.attn_k.bias is missing"),
    "norm": ("qwen3 head_dim", drop("blk.0.attn_q_norm.weight"), "blk.0.attn_q_norm.weight is mi"),
    "more": ("llama", add_bias, "blk.1.ffn_up.bias is not in the base"),
    "layers": ("llama", more_layers, "blk.2.attn_k.weight is not in the base"),
    "turned": ("llama", turn, "blk.0.ffn_gate.weight is 64 x 96, not 96 x 64"),
}


@pytest.mark.parametrize("fault", SHAPES)
def test_each_fault_is_named(
    fault: str, files: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    variant, change, words = SHAPES[fault]
    file = rewritten(files[variant], tmp_path / "model.gguf", change_tensors=change)
    check = check_shapes(file, made[variant])
    assert (check.ok, check.fatal) == (False, True)
    assert words in check.actual


def scaled(name: str, factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        data, kind = tensors[name]
        tensors[name] = (np.where(np.arange(len(data)) == 3, data * factor, data), kind)

    return change


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("llama", "output_norm.weight"),
        ("llama biases", "blk.0.attn_q.bias"),
        ("llama rope", "rope_freqs.weight"),
    ],
)
def test_one_value_that_training_moved_by_a_step_is_found(
    variant: str, name: str, files: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    """A step of BF16 is 0.4 to 0.8 %; what F16 rounds on the way is a tenth of that."""
    other = rewritten(files[variant], tmp_path / "a", change_tensors=scaled(name, 1.004))
    check = check_weights(other, made[variant])
    assert (check.ok, check.fatal) == (False, True)
    assert check.actual == f"{name} has other values"
    rounded = rewritten(files[variant], tmp_path / "b", change_tensors=scaled(name, 1.0005))
    assert check_weights(rounded, made[variant]).ok


def test_copy_of_a_tied_head_is_let_pass(
    files: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    def copy(tensors: Tensors) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"]

    file = rewritten(files["qwen2 tied"], tmp_path / "model.gguf", change_tensors=copy)
    assert check_shapes(file, made["qwen2 tied"]).ok
    assert check_weights(file, made["qwen2 tied"]).ok


def test_head_of_its_own_where_the_base_has_a_tied_one(
    files: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    def other(tensors: Tensors) -> None:
        data, kind = tensors["token_embd.weight"]
        tensors["output.weight"] = (np.ascontiguousarray(data[::-1]), kind)

    file = rewritten(files["qwen2 tied"], tmp_path / "model.gguf", change_tensors=other)
    check = check_weights(file, made["qwen2 tied"])
    assert not check.ok
    assert check.actual.startswith("output.weight is 1.")


def reorder(tensors: Tensors) -> None:
    """Rows as transformers keeps them: what converters once forgot to change."""
    data, kind = tensors["blk.1.attn_k.weight"]
    halves = data.reshape(2, 8, 2, -1).swapaxes(1, 2).reshape(data.shape)
    tensors["blk.1.attn_k.weight"] = (np.ascontiguousarray(halves), kind)


def test_rows_of_another_rotary_embedding_are_found(
    files: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    file = rewritten(files["llama"], tmp_path / "model.gguf", change_tensors=reorder)
    check = check_weights(file, made["llama"])
    assert not check.ok
    assert re.fullmatch(r"blk\.1\.attn_k\.weight is 1\.\d of its size apart", check.actual)


@pytest.mark.parametrize("name", ["Q2_K", "IQ2_XS", "Q4_0"])
def test_narrowest_types_are_near_and_other_weights_are_not(name: str, tmp_path: Path) -> None:
    """Norms are all one in both, and nothing but the matrices tells."""
    files = {}
    for seed in (0, 1):
        write_model(tmp_path / str(seed), seed)
        write_tokenizer(tmp_path / str(seed))
        convert.convert(tmp_path / str(seed), tmp_path / "f16.gguf", "F16")
        weights = {
            f"blk.{i}.{part}.weight": np.ones(columns, np.float32) for i, part, columns in PARTS
        }
        files[seed] = tmp_path / f"{seed}.gguf"
        quantization.quantize(tmp_path / "f16.gguf", files[seed], name, weights)
    assert check_weights(files[0], tmp_path / "0").ok
    check = check_weights(files[1], tmp_path / "0")
    assert "token_embd.weight is 1.4 of its size apart" in check.actual
