"""What a folder with a GGUF file holds, with its base, without it, and of no known architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qgrid import models
from qgrid.gguf import convert, quantization
from qgrid.weights import inspection, verification


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_random: Path) -> Path:
    """A folder with the random model as Q4_K_M and its config."""
    folder = tmp_path_factory.mktemp("stored")
    convert.convert(tiny_random, folder / "whole", "BF16")
    quantization.quantize(folder / "whole", folder / "model.gguf", "Q4_K_M")
    (folder / "whole").unlink()
    shutil.copyfile(tiny_random / "config.json", folder / "config.json")
    return folder


def test_folder_is_accounted_for_to_the_byte(stored: Path, tiny_random: Path) -> None:
    contents = inspection.inspect(stored, tiny_random, "gguf")
    assert contents.format == "gguf"
    assert sum(contents.tensor_types.values()) == len(contents.tensors) == 20
    assert contents.tensor_types.keys() == contents.dtypes.keys() == {"Q4_K", "Q6_K", "F32"}
    size = (stored / "model.gguf").stat().st_size
    data = sum(contents.dtypes.values())
    assert size - 60_000 < data < size
    assert contents.bits_per_weight == 8 * data / contents.num_parameters
    by_weight = sum(state.bits * state.num_weights for state in contents.modules.values())
    weights = sum(state.num_weights for state in contents.modules.values())
    assert contents.linear_bits_per_weight == by_weight / weights
    assert all(state.method == "gguf" for state in contents.modules.values())


def test_parameters_are_the_checkpoints(stored: Path, tiny_random: Path) -> None:
    base = models.architecture(tiny_random)["num_parameters"]
    assert inspection.inspect(stored).num_parameters == base
    tensors = inspection.read_headers(stored)
    assert inspection.num_parameters(stored, tensors) == base


def test_layer_that_the_file_lacks_is_missing(stored: Path, tmp_path: Path) -> None:
    config = json.loads((stored / "config.json").read_text())
    config["num_hidden_layers"] = 3
    shutil.copyfile(stored / "model.gguf", tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text(json.dumps(config))
    contents = inspection.inspect(tmp_path, None, "gguf")
    missing = {name for name, state in contents.modules.items() if state.format == "missing"}
    assert missing == {name for name in contents.modules if ".layers.2." in name}
    assert len(missing) == 7


def test_unknown_architecture_keeps_the_files_own_names(stored: Path, tmp_path: Path) -> None:
    config = json.loads((stored / "config.json").read_text()) | {"architectures": ["Other"]}
    shutil.copyfile(stored / "model.gguf", tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text(json.dumps(config))
    modules = inspection.inspect(tmp_path, None, "gguf").modules
    assert len(modules) == 14
    assert modules["blk.1.ffn_down"].format == "Q6_K"


def test_safetensors_are_read_where_both_lie(stored: Path, tiny_random: Path) -> None:
    """As in many published folders; an artifact never holds both."""
    both = stored / "both"
    shutil.copytree(tiny_random, both)
    shutil.copyfile(stored / "model.gguf", both / "model.gguf")
    assert [path.name for path in inspection.weight_files(both)] == ["model.safetensors"]
    assert inspection.inspect(both).format == "safetensors-16bit"


def test_second_copy_in_another_layout_is_not_counted(tiny_random: Path, tmp_path: Path) -> None:
    """As Mistral publishes: the file that transformers does not read has the same weights again."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_random, folder)
    plain = inspection.inspect(folder)
    tensors = load_file(folder / "model.safetensors")
    copies = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(copies, folder / "consolidated.safetensors")
    assert inspection.inspect(folder) == plain
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspection.inspect(folder) == plain


def test_whole_and_torn_files(stored: Path, tmp_path: Path) -> None:
    assert verification.check_whole(stored).ok
    shutil.copyfile(stored / "config.json", tmp_path / "config.json")
    assert "no safetensors or GGUF file" in verification.check_whole(tmp_path).actual
    (tmp_path / "model.gguf").write_bytes((stored / "model.gguf").read_bytes()[:-100])
    assert "its header says" in verification.check_whole(tmp_path).actual


@pytest.mark.parametrize(
    ("module", "is_router"),
    [
        ("model.layers.0.mlp.gate", True),  # Qwen, DeepSeek, OLMoE
        ("model.layers.0.block_sparse_moe.gate", True),  # Mixtral
        ("model.layers.0.mlp.shared_expert_gate", True),
        ("model.layers.0.feed_forward.router", True),  # Llama 4
        ("model.layers.0.mlp.router", True),  # gpt-oss
        ("model.layers.0.mixer.gate", True),  # Nemotron-H
        ("model.layers.0.mlp.gate_proj", False),
        ("model.layers.0.mlp.experts.3.gate_proj", False),
        ("model.layers.0.self_attn.gate", False),
    ],
)
def test_routers_are_told_from_other_gates(module: str, is_router: bool) -> None:
    assert inspection.is_router(module) == is_router
    assert inspection.is_decoder_linear(module) != is_router
