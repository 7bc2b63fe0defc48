"""What the converter does not know is refused by name, while planning and while converting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qgrid.contracts import Unsupported
from qgrid.gguf import convert


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    "mixture": ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    "no architecture": ({"architectures": None}, "`architectures`"),
    "activation": ({"hidden_act": "gelu"}, "`hidden_act` in config.json is gelu"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "`rope_type`.*yarn"),
    "older rope": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "linear"),
    "rope by layer": ({"rope_parameters": {"full_attention": {}}}, "`rope_parameters`"),
    "llama3 rope": ({"rope_parameters": {"rope_type": "llama3"}}, "llama3.*no `original_max"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor`.*0.5"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "already quantized.*awq"),
    "layer kinds": ({"layer_types": ["sliding_attention"] * 2}, "`sliding_window`"),
    "shape": ({"num_key_value_heads": 4}, r"k_proj.*shape \(32, 64\).*\(64, 64\)"),
    "missing": ({"num_hidden_layers": 3}, "no tensor `model.layers.2"),
    "unknown": ({"num_hidden_layers": 1}, "`model.layers.1.*that llama does not"),
    "no size": ({"intermediate_size": None}, "no `intermediate_size`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_unknown_is_refused_by_name(checkpoint: Path, case: str, tmp_path: Path) -> None:
    assert convert.refusal(checkpoint) is None
    keys, words = REFUSED[case]
    change(checkpoint, **keys)
    with pytest.raises(Unsupported, match=words) as caught:
        convert.convert(checkpoint, tmp_path / "model.gguf", "F16")
    assert convert.refusal(checkpoint) == str(caught.value)


@pytest.mark.parametrize(
    ("variant", "keys", "words"),
    [
        ("mistral head_dim", {"sliding_window": 256}, "`sliding_window` in config.json is 256"),
        ("qwen2 tied", {"use_sliding_window": True, "sliding_window": 256}, None),
        ("qwen3 head_dim", {"attention_bias": True}, "`attention_bias`"),
        ("qwen2 tied", {"head_dim": 24}, "heads \\* `head_dim` .* is 96 and `hidden_size` 64"),
    ],
)
def test_what_one_architecture_lacks(
    made: dict[str, Path], tmp_path: Path, variant: str, keys: dict[str, Any], words: str | None
) -> None:
    source = tmp_path / "source"
    shutil.copytree(made[variant], source)
    change(source, **keys)
    if words is None:  # Qwen's window starts at a layer that this model does not have
        change(source, layer_types=None)
        assert convert.refusal(source) is None
        change(source, max_window_layers=1)
        words = "`sliding_window`"
    with pytest.raises(Unsupported, match=words):
        convert.convert(source, tmp_path / "model.gguf", "F16")


def test_a_window_as_wide_as_the_context_is_none(made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["mistral head_dim"], source)
    change(source, sliding_window=512)
    assert convert.refusal(source) is None


def test_a_torn_or_missing_weights_file_is_refused(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "model.safetensors has" in str(convert.refusal(checkpoint))
    weights.unlink()
    assert "no safetensors file" in str(convert.refusal(checkpoint))
    weights.write_bytes(whole)
    assert convert.refusal(checkpoint) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_torn_json_file_is_refused(checkpoint: Path, name: str) -> None:
    whole = (checkpoint / name).read_text()
    (checkpoint / name).write_text(whole[: len(whole) // 2])
    assert "a JSON file of the checkpoint cannot be read" in str(convert.refusal(checkpoint))


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    assert convert.refusal(checkpoint) is None  # older byte-level files; read while converting
    (checkpoint / "vocab.json").unlink()
    assert "no tokenizer.json" in str(convert.refusal(checkpoint))
