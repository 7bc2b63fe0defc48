"""W8A8 through llmcompressor: int8 after SmoothQuant, and FP8, against rounding done by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qgrid.methods import fp8, smoothquant
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell
from qgrid.weights import artifacts, inspection
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.methods import checkpoints
from tests.methods.checkpoints import MODEL, Made

LARGEST = 448.0  # of E4M3
SCHEMES = ("dynamic", "static", "block")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_what_it_says(
    scheme: str, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, "fp8", 8, scheme=scheme)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {"fp8": 14}
    contents = inspection.inspect(Path(job.artifact))  # without its base
    expected = fp8.stored_bits(8, {"scheme": scheme}, *contents.shapes[NAME])
    assert contents.modules[NAME].bits == pytest.approx(expected)
    assert contents.format == "float-quantized"


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp8_weights_are_the_nearest_of_their_scale(scheme: str, made: Made) -> None:
    """Three bits of mantissa: a relative error of 2^-4 / sqrt(3) at most, 2.3 to 2.8 % overall."""
    folder, _ = made("fp8", 8, scheme=scheme)
    stored = load_file(folder / "model.safetensors")
    before = load_file(MODEL / "model.safetensors")[f"{NAME}.weight"].double()
    scale = _spread(stored[f"{NAME}.weight_scale"].double(), before.shape)
    blocks = {"dynamic": (1, 256), "static": before.shape, "block": (128, 128)}[scheme]
    wanted = _largest(before, blocks) / LARGEST
    assert torch.allclose(scale, wanted, rtol=2**-8)  # stored in bf16
    codes = stored[f"{NAME}.weight"]
    nearest = (before / scale).clamp(-LARGEST, LARGEST).float().to(torch.float8_e4m3fn)
    assert (
        float((codes.float() == nearest.float()).double().mean()) > 0.9
    )  # library divides in bf16
    error = codes.double() * scale - before
    assert 0.023 < float(error.norm() / before.norm()) < 0.028


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One scale a weight."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    rows, columns = (size // count for size, count in zip(shape, scale.shape, strict=True))
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _largest(weight: torch.Tensor, block: Any) -> torch.Tensor:
    rows, columns = block
    tiles = weight.abs().unfold(0, rows, rows).unfold(1, columns, columns)
    return _spread(tiles.amax((2, 3)), weight.shape)


def test_smoothed_weights_are_the_nearest_of_the_scaled_ones(made: Made) -> None:
    """Scales are in the norm before, a rounding step is a row's largest weight / 127.5."""
    folder, _ = made("smoothquant", 8)
    stored = load_file(folder / "model.safetensors")
    before = load_file(MODEL / "model.safetensors")
    norm = "model.layers.0.post_attention_layernorm.weight"
    smooth = before[norm].double() / stored[norm].double()
    assert float(smooth.max() / smooth.min()) > 2  # it did smooth
    weight = before[f"{NAME}.weight"].double() * smooth
    found = stored[f"{NAME}.weight"].double() * stored[f"{NAME}.weight_scale"].double()
    step = weight.abs().amax(1, keepdim=True) / 127.5
    expected = (step**2 / 12).expand(weight.shape).sum().sqrt()
    # bf16 norms and weights put 2^-9 / sqrt(3) of each weight on top
    assert 0.9 < float((found - weight).norm() / expected) < 1.4


def test_a_model_that_is_not_smoothed_fails_the_check(tmp_path: Path, tiny_random: Path) -> None:
    check = smoothquant._check_smoothed(tiny_random, tiny_random)
    assert not check.ok
    assert check.fatal
    assert check.actual == "0 norms changed, in a model of 2 layers"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "stored", "label"),
    [("smoothquant", "int-quantized", "int8"), ("fp8", "float-quantized", "fp8")],
)
def test_transformers_rounds_activations_and_says_so(
    method: str, stored: str, label: str, dtype: str, made: Made
) -> None:
    """Rounded by token, then multiplied with unpacked weights in floating point."""
    folder, cell = made(method, 8)
    loaded = runtime.load(folder, cell, dtype)
    seen = loaded.observed()
    assert seen["stores_in"] == {stored: 35}
    assert seen["computes_in"] == {f"{dtype} with activations rounded to {label}": 35}
    assert seen["decompressed"]
    assert seen["kernel"] == "dense"
    assert [layer["scheme"] for layer in seen["linear_kernels"]] == ["W8A8"]
    layer = loaded._model.get_submodule(NAME)
    torch.manual_seed(0)
    given = (torch.randn(7, 256) * torch.rand(7, 1)).to(layer.weight.dtype)
    with torch.inference_mode():
        made_of = layer(given[None])[0].double()
        plainly = given.double() @ layer.weight.double().T
        rounded = _rounded(given.double(), method) @ layer.weight.double().T
    apart = float((made_of - rounded).norm() / plainly.norm())
    effect = float((plainly - rounded).norm() / plainly.norm())
    assert effect > 0.005
    assert apart < effect * (1e-3 if dtype == "float32" else 1.0)
    loaded.close()


def _rounded(given: torch.Tensor, method: str) -> torch.Tensor:
    """By hand: a scale a token, so that its largest value is the largest code."""
    largest = given.abs().amax(1, keepdim=True)
    if method == "fp8":
        scale = largest / LARGEST
        return (given / scale).float().to(torch.float8_e4m3fn).double() * scale
    scale = largest / 127.5
    return (given / scale).round().clamp(-128, 127) * scale


def test_eight_bits_cost_little_and_more_than_weights_alone(made: Made) -> None:
    """KL divergence from 16 bits on the trained model; int8 rounds finer than E4M3."""

    def apart(method: str, **changes: Any) -> float:
        return checkpoints.divergence(checkpoints.scored(made(method, 8, **changes))[0])

    smooth = apart("smoothquant")
    eights = [apart("fp8", scheme=scheme) for scheme in SCHEMES]
    assert 1e-6 < smooth < 1e-3
    assert all(smooth < each < 5e-3 for each in eights)


def test_blocks_that_do_not_divide_are_refused_before_any_work(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    folder = tmp_path / "odd"
    write_model(folder, intermediate_size=320, num_hidden_layers=1)
    write_tokenizer(folder)
    job = jobs.job(make_cell, tmp_path, folder, "fp8", 8, scheme="block")
    said = str(fp8.refusal(job.planned.cell))
    assert "blocks of 128 x 128, which do not divide 3 layers" in said
    assert "model.layers.0.mlp.down_proj (256 x 320)" in said
    easy = jobs.job(make_cell, tmp_path, folder, "fp8", 8)
    assert fp8.refusal(easy.planned.cell) is None


def test_only_static_scales_need_calibration() -> None:
    assert [fp8.calibrates({"scheme": scheme}) for scheme in SCHEMES] == [False, True, False]
