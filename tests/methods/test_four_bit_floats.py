"""Four-bit floats: NVFP4 and MXFP4 through llmcompressor, FP4 and NF4 through bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qgrid import calibration, registry
from qgrid.methods import _checkpoint
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell
from qgrid.weights import artifacts, inspection
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.methods import checkpoints
from tests.methods.checkpoints import MODEL, Made

NAME = "model.layers.0.mlp.up_proj"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
FP4 = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12  # by code


@pytest.mark.parametrize(
    ("method", "changes", "stored", "bits"),
    [
        ("nvfp4", {}, "nvfp4-pack-quantized", 4.5),
        ("nvfp4", {"activations": True}, "nvfp4-pack-quantized", 4.5),
        ("mxfp4", {}, "mxfp4-pack-quantized", 4.25),
        ("mxfp4", {"activations": True}, "mxfp4-pack-quantized", 4.25),
        ("mxfp4", {"keep": {"model.layers.0.*": 16}}, "mxfp4-pack-quantized", 4.25),
        ("fp4", {}, "bitsandbytes-fp4", None),
        ("fp4", {"double_quant": False}, "bitsandbytes-fp4", None),
    ],
)
def test_every_form_is_what_it_says(
    method: str,
    changes: dict[str, Any],
    stored: str,
    bits: float | None,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, method, 4, **changes)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert {"reload", "bits", "coverage"} <= {check.name for check in result.checks}
    assert result.observed["format"] == stored
    count = 7 if "keep" in changes else 14
    assert result.observed["module_methods"][method] == count
    contents = inspection.inspect(Path(job.artifact))  # without its base
    assert len(contents.modules) == 14
    name = "model.layers.1.mlp.up_proj"
    module: Any = registry.method(method)
    expected = module.stored_bits(4, jobs.options(method, **changes), *contents.shapes[name])
    assert contents.modules[name].bits == pytest.approx(expected, rel=1e-3)
    if bits is not None:
        assert contents.modules[name].bits == pytest.approx(bits, rel=1e-3)


# --- truth: the trained model, decoded by hand ---------------------------------------------------


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Weights `(rows, columns)` of every quantized layer, fp64, by the definition of its format."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name in stored:
        layer, _, part = name.rpartition(".")
        parts = {k.removeprefix(f"{layer}."): v for k, v in stored.items() if k.startswith(layer)}
        if part == "weight_packed":
            found[layer] = _grid(parts)
        elif part == "absmax":
            layer = layer.removesuffix(".weight")
            found[layer] = _blocks(stored, layer)
    return found


def _grid(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """E2M1 times a scale: E4M3 for 16 over an fp32 one, or a power of two for 32."""
    codes = _nibbles(parts["weight_packed"], low_first=True)
    values = E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    scale = parts["weight_scale"]
    if scale.dtype == torch.uint8:
        factors = 2.0 ** (scale.double() - 127)
    else:
        factors = scale.double() / parts["weight_global_scale"].double()
    return values * factors.repeat_interleave(values.shape[1] // factors.shape[1], 1)


def _blocks(stored: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    """FP4 in twelfths times the largest of 64 weights, which itself may be a code."""
    name = f"{layer}.weight"
    codes = _nibbles(stored[name].reshape(1, -1), low_first=False).flatten()
    values = FP4[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    return (values.reshape(-1, 64) * stored[f"{name}.absmax"].double()[:, None]).flatten()


def _nibbles(packed: torch.Tensor, low_first: bool) -> torch.Tensor:
    """Two codes a byte, along rows."""
    pair = [packed & 15, packed >> 4]
    codes = torch.stack(pair if low_first else pair[::-1], -1)
    return codes.flatten(-2).long()


def _plain() -> dict[str, torch.Tensor]:
    found = load_file(MODEL / "model.safetensors")
    return {name.removesuffix(".weight"): value.double() for name, value in found.items()}


def _apart(weight: torch.Tensor, original: torch.Tensor) -> float:
    return float((weight - original.reshape(weight.shape)).norm() / original.norm())


def rounded(weight: torch.Tensor, method: str, tensor: float = 1.0) -> torch.Tensor:
    """The nearest values of a grid under the scales that the format's definition gives, by hand.

    `tensor` is what NVFP4 multiplies all weights with.
    """
    size = {"nvfp4": 16, "mxfp4": 32, "fp4": 64}[method]
    groups = weight.reshape(-1, size)
    largest = groups.abs().amax(1, keepdim=True)
    if method == "fp4":
        scale, grid = largest, FP4.sort().values
    elif method == "mxfp4":  # a largest weight of 1.75 times a power of two counts as the next one
        scale, grid = 2.0 ** (torch.floor(torch.log2(largest * 8 / 7)) - 2), E2M1
    else:
        scale = (largest / 6 * tensor).float().to(torch.float8_e4m3fn).double() / tensor
        grid = E2M1
    middles = (grid[1:] + grid[:-1]) / 2
    nearest = grid[torch.bucketize((groups / scale).abs(), middles)]
    return (nearest * groups.sign() * scale).reshape(weight.shape)


FORMS = [("nvfp4", {}), ("mxfp4", {}), ("fp4", {"double_quant": False})]


@pytest.mark.parametrize(("method", "changes"), FORMS)
def test_weights_are_the_nearest_of_their_grid(
    method: str, changes: dict[str, Any], made: Made
) -> None:
    """As far from the original as normal weights are that are rounded so, within 10 %.

    That is 9.5 % of them for E2M1 under scales of 16, 11.4 % under powers of two for 32, and 12.3 %
    for FP4 under the largest of 64: the trained weights are nearly normal.
    """
    folder, _ = made(method, 4, **changes)
    weights, before = dequantized(folder), _plain()
    assert len(weights) == 35
    normal = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).double()
    band = _apart(rounded(normal, method, 100.0), normal)
    assert band == pytest.approx({"nvfp4": 0.095, "mxfp4": 0.114, "fp4": 0.123}[method], rel=0.02)
    stored = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        tensor = stored.get(f"{name}.weight_global_scale", torch.ones(1)).item()
        wanted = rounded(before[name], method, tensor).reshape(weight.shape)
        # The library divides in bf16: of values in the middle between two, the other one.
        same = (weight - wanted).abs() <= 2**-7 * wanted.abs()
        assert float(same.double().mean()) > 0.97
        error = _apart(weight, before[name])
        assert error == pytest.approx(_apart(wanted, before[name]), rel=0.02)
        assert error == pytest.approx(band, rel=0.10)


def test_layers_that_read_the_same_input_share_their_scale_of_the_tensor(made: Made) -> None:
    """So that they can run as one: the largest weight of them becomes 448 times 6."""
    stored = load_file(made("nvfp4", 4)[0] / "model.safetensors")
    before = _plain()
    for parts in (["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]):
        names = [f"model.layers.0.{part}" for part in parts]
        largest = max(float(before[name].abs().max()) for name in names)
        for name in names:
            scale = stored[f"{name}.weight_global_scale"].item()
            assert scale == pytest.approx(448 * 6 / largest, rel=2**-8)  # taken in bf16


@pytest.mark.parametrize(("method", "changes"), FORMS)
def test_loaded_model_computes_the_decoded_weights(
    method: str, changes: dict[str, Any], made: Made
) -> None:
    """In fp32. Weights of NVFP4 are unpacked to bf16, which rounds a scale times a code."""
    folder, cell = made(method, 4, **changes)
    found, seen = checkpoints.scored((folder, cell))
    (stored,) = registry.support(cell.method).produces.values()
    assert seen["stores_in"] == {stored: 35}
    weights = dequantized(folder)
    if method == "nvfp4":
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    assert float((found - checkpoints.computed(weights)).abs().max()) < 1e-3
    assert float((found - checkpoints.base()).abs().max()) > 0.05  # of the plain weights


@pytest.mark.parametrize("method", ["nvfp4", "mxfp4"])
def test_activations_are_rounded_to_the_grid(method: str, made: Made) -> None:
    """By hand: `rounded`, under NVFP4's scale of the tensor that calibration text gave.

    That scale takes the largest activation of the text to 448 times 6.
    """
    folder, cell = made(method, 4, activations=True)
    loaded = runtime.load(folder, cell, "float32")
    seen = loaded.observed()
    assert seen["computes_in"] == {"float32 with activations rounded to fp4": 35}
    assert [layer["scheme"] for layer in seen["linear_kernels"]] == ["W4A4"]
    layer = loaded._model.get_submodule(NAME)
    given = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = layer(given[None])[0].double()
    weight, exact = layer.weight.double().T, given.double()
    effect = _apart(exact @ weight, found)
    assert 0.08 < effect < 0.20  # as the weights: 10 to 13 % of each activation
    stored = load_file(folder / "model.safetensors")
    tensor = stored.get(f"{NAME}.input_global_scale", torch.ones(1)).item()
    assert _apart(rounded(exact, method, tensor) @ weight, found) < effect / 100
    loaded.close()
    if method == "nvfp4":
        assert tensor == pytest.approx(448 * 6 / _largest_input(cell), rel=0.05)


def _largest_input(cell: Cell) -> float:
    """The largest activation that the 16-bit model has there on the cell's calibration text."""
    assert cell.calibration is not None
    model, found = checkpoints.dense(), []
    layer = model.get_submodule(NAME)
    layer.register_forward_pre_hook(lambda _, given: found.append(float(given[0].abs().max())))
    rows = calibration.draw(cell.calibration, _checkpoint.tokenizer(MODEL, cell.model), 0).rows
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(row) for row in rows]))
    return max(found)


def test_four_bits_cost_about_the_same_and_rounded_activations_more(made: Made) -> None:
    """KL divergence from 16 bits on the trained model."""

    def apart(method: str, **changes: Any) -> float:
        return checkpoints.divergence(checkpoints.scored(made(method, 4, **changes))[0])

    forms = {method: apart(method, **changes) for method, changes in FORMS}
    assert forms["nvfp4"] < forms["mxfp4"]  # scales of 16 in FP8 against powers of two for 32
    assert all(1e-4 < each < 0.1 for each in forms.values())
    for method in ("nvfp4", "mxfp4"):
        assert apart(method, activations=True) > 1.2 * forms[method]


# --- before any work -----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "group"), [("nvfp4", 16), ("mxfp4", 32)])
def test_groups_that_do_not_divide_are_refused_with_two_ways_out(
    method: str, group: int, tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    folder = tmp_path / "odd"
    write_model(folder, intermediate_size=264, num_hidden_layers=1)
    write_tokenizer(folder)
    module: Any = registry.method(method)
    job = jobs.job(make_cell, tmp_path, folder, method, 4)
    said = str(module.refusal(job.planned.cell))
    assert f"groups of {group} columns, which do not divide 1 layers" in said
    assert "model.layers.0.mlp.down_proj (264 columns)" in said
    kept = jobs.job(make_cell, tmp_path, folder, method, 4, keep={"*.down_proj": 16})
    assert module.refusal(kept.planned.cell) is None  # the first way out, followed
    assert all(check.ok for check in artifacts.build(kept).checks)


def test_only_the_scale_of_activations_needs_calibration() -> None:
    module: Any = registry.method("nvfp4")
    assert [module.calibrates({"activations": each}) for each in (False, True)] == [False, True]
