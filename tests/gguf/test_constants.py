"""Sizes and constants in a file against the config of its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qgrid.gguf import convert
from qgrid.gguf.constants import check_constants
from tests.gguf.checkpoints import LLAMA3_ROPE
from tests.gguf.rewriting import rewritten, set_key


@pytest.fixture(scope="module")
def file(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("constants") / "model.gguf"
    convert.convert(made["llama"], out, "F16")
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-5}, "layer_norm_rms_epsilon is 1e-06, not 1e-05"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope.freq_base is 10000, not 500000"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architecture is llama, not qwen2"),
        ({"num_attention_heads": 8, "head_dim": 8}, "head_count is 4, not 8"),
        ({"rope_parameters": LLAMA3_ROPE}, "stretched rotary frequencies: none, not one"),
    ],
)
def test_other_constants_than_the_bases_are_named(
    changes: dict[str, Any], message: str, file: Path, checkpoint: Path
) -> None:
    assert check_constants(file, checkpoint).ok
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    check = check_constants(file, checkpoint)
    assert (check.ok, check.fatal) == (False, True)
    assert message in check.actual


@pytest.mark.parametrize("key", ["scaling.factor", "scale_linear", "scaling.attn_factor"])
def test_rotary_scaling_without_a_type_is_found(
    key: str, file: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    """llama.cpp takes the factor as linear scaling: the type is only its name."""
    scaled = rewritten(file, tmp_path / "a.gguf", set_key(f"llama.rope.{key}", 8.0))
    assert f"rope.{key} is 8.0, not 1" in check_constants(scaled, made["llama"]).actual
    harmless = rewritten(file, tmp_path / "b.gguf", set_key(f"llama.rope.{key}", 1.0))
    assert check_constants(harmless, made["llama"]).ok


def test_unknown_rotary_scaling_is_named(file: Path, made: dict[str, Path], tmp_path: Path) -> None:
    yarn = rewritten(file, tmp_path / "a.gguf", set_key("llama.rope.scaling.type", "yarn"))
    assert "rope.scaling.type is yarn" in check_constants(yarn, made["llama"]).actual


def test_table_of_frequencies_that_the_base_has_not(made: dict[str, Path], tmp_path: Path) -> None:
    convert.convert(made["llama rope"], tmp_path / "model.gguf", "F16")
    assert check_constants(tmp_path / "model.gguf", made["llama rope"]).ok
    base = tmp_path / "base"
    shutil.copytree(made["llama rope"], base)
    config = json.loads((base / "config.json").read_text()) | {"rope_parameters": None}
    (base / "config.json").write_text(json.dumps(config))
    assert "one, not none" in check_constants(tmp_path / "model.gguf", base).actual
