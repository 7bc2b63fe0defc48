"""The importance matrix against what the layers' inputs are by another way of computing them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qgrid import calibration
from qgrid.calibration_texts import BadCalibration
from qgrid.gguf import convert, importance, layers, quantization

ROWS = tuple(tuple((7 * i * i + 3 * row) % 512 for i in range(48)) for row in range(5))


@pytest.fixture(scope="module")
def model(tiny_random: Path) -> Any:
    return importance.load(tiny_random, {}, "cpu")


def test_inputs_of_every_layer_but_the_last_are_normed_hidden_states(
    tiny_random: Path, model: Any
) -> None:
    import torch

    found = importance.collect(model, ROWS, layers.places(tiny_random))
    with torch.inference_mode():
        states = model(torch.tensor(ROWS), output_hidden_states=True).hidden_states
    for number, layer in enumerate(model.model.layers):
        hidden = states[number].double()
        scale = (hidden.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
        inputs = (hidden * scale * layer.input_layernorm.weight.double()).flatten(0, 1)
        for name in ("attn_q", "attn_k", "attn_v"):
            values = found[f"blk.{number}.{name}.weight"]
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, inputs.pow(2).mean(0).detach().numpy(), rtol=1e-4)


def test_every_linear_layer_has_its_columns(tiny_random: Path, model: Any) -> None:
    found = importance.collect(model, ROWS, layers.places(tiny_random))
    assert len(found) == 14
    assert {name: len(values) for name, values in found.items() if "blk.1." in name} == {
        **{f"blk.1.attn_{part}.weight": 256 for part in ("q", "k", "v", "output")},
        "blk.1.ffn_gate.weight": 256,
        "blk.1.ffn_up.weight": 256,
        "blk.1.ffn_down.weight": 512,
    }


def test_batches_change_nothing(
    tiny_random: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = layers.places(tiny_random)
    together = importance.collect(model, ROWS, places)
    monkeypatch.setattr(calibration, "_BATCH_TOKENS", 1)
    for name, values in importance.collect(model, ROWS, places).items():
        np.testing.assert_allclose(values, together[name], rtol=1e-5)


def test_channels_that_are_never_driven_are_not_stored_as_zeros(
    tiny_random: Path, tmp_path: Path
) -> None:
    """The quantizer writes zeros for a block without any importance, and calls it success."""
    import torch

    model = importance.load(tiny_random, {}, "cpu")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:128] = 0
    found = importance.collect(model, ROWS, layers.places(tiny_random))
    assert found["blk.0.attn_q.weight"][:128].max() > 0
    convert.convert(tiny_random, tmp_path / "whole.gguf", "BF16")
    quantization.quantize(tmp_path / "whole.gguf", tmp_path / "q.gguf", "Q4_K_M", found)
    tensor = next(
        t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors if t.name == "blk.0.attn_q.weight"
    )
    undriven = gguf.dequantize(tensor.data, tensor.tensor_type)[:, :128]
    assert (undriven != 0).mean() > 0.8


def test_layer_that_is_never_driven_is_named(tiny_random: Path) -> None:
    import torch

    model = importance.load(tiny_random, {}, "cpu")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[:] = 0
    with pytest.raises(BadCalibration, match=r"never drives blk\.1\.ffn_\w+\.weight"):
        importance.collect(model, ROWS, layers.places(tiny_random))


def test_no_hook_stays_behind(tiny_random: Path, model: Any) -> None:
    importance.collect(model, ROWS, layers.places(tiny_random))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_values_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    """llama.cpp's own tool tokenizes by itself, so that both get its ids from a plain text."""
    tool = shutil.which("llama-imatrix")
    if tool is None:
        pytest.skip("there is no `llama-imatrix` on the PATH")
    from transformers import AutoTokenizer

    from qgrid import demo, models

    text = tmp_path / "text.txt"
    text.write_text("The baker paid 12 coins for 3 loaves and walked home. " * 80)
    convert.convert(demo.MODEL_DIR, tmp_path / "f16.gguf", "F16")
    done = subprocess.run(
        [tool, "-m", tmp_path / "f16.gguf", "-f", text, "-c", "128", "-o", tmp_path / "i.gguf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ids = AutoTokenizer.from_pretrained(demo.MODEL_DIR)(text.read_text())["input_ids"]
    rows = [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]
    model = importance.load(demo.MODEL_DIR, models.load_options(_model()), "cpu")
    ours = importance.collect(model, rows, layers.places(demo.MODEL_DIR))
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    for name, values in ours.items():
        theirs = (stored[f"{name}.in_sum2"] / stored[f"{name}.counts"]).flatten()
        # It keeps keys, values and the inputs of products in 16 bits: 1e-3 apart was measured.
        assert np.linalg.norm(values - theirs) < 3e-3 * np.linalg.norm(theirs), name


def _model() -> Any:
    from qgrid.types import Model

    return Model("tiny", "qgrid/tiny", None, False, False)
