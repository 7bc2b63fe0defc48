"""Stored weights, decoded by hand, against the original; a loaded model against those weights.

Of the methods whose own test files do not have the same: whatever is written as whole numbers,
E4M3 or NF4 into the formats of compressed-tensors and bitsandbytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qgrid.types import Cell
from tests.methods import checkpoints, decoding
from tests.methods.checkpoints import MODEL, Made
from tests.methods.decoding import Parts

ROW: dict[str, Any] = {"group_size": None}
ZEROS: dict[str, Any] = {"symmetric": False}

# Norms with the layers that read them, and a layer with the one whose rows it reads.
_READ = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_LAST, _BEFORE = "mlp.down_proj", "mlp.up_proj"


def scaled(now: Parts, folder: Path) -> Parts:
    """The original weights with what a method moved from activations into them.

    Columns behind a norm are multiplied by what the norm lost. Columns of the last layer of an MLP
    are multiplied by what the rows before them lost: the factor that fits a decoded row best.
    """
    then = decoding.originals(MODEL)
    old, new = load_file(MODEL / "model.safetensors"), load_file(folder / "model.safetensors")
    for layer in {name.rsplit(".", 2)[0] for name in then}:
        for norm, readers in _READ.items():
            lost = old[f"{layer}.{norm}.weight"].double() / new[f"{layer}.{norm}.weight"].double()
            for each in readers:
                then[f"{layer}.{each}"] *= lost
        rows, fitted = then[f"{layer}.{_BEFORE}"], now[f"{layer}.{_BEFORE}"]
        kept = (fitted * rows).sum(1) / rows.square().sum(1)
        then[f"{layer}.{_BEFORE}"] = rows * kept[:, None]
        then[f"{layer}.{_LAST}"] /= kept
    return then


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_width(method: str, bits: int, made: Made) -> None:
    _require_even_steps(made(method, bits))
    _require_plain_products(made(method, bits))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bits", "changes"),
    [("rtn", 4, ROW), ("rtn", 4, ZEROS), ("gptq", 4, ZEROS),
     ("awq", 4, {}), ("awq", 4, ZEROS), ("awq", 8, {})],
)  # fmt: skip
def test_other_groups(method: str, bits: int, changes: dict[str, Any], made: Made) -> None:
    _require_even_steps(made(method, bits, **changes))
    _require_plain_products(made(method, bits, **changes))


@pytest.mark.parametrize("method", ["smoothquant", "int8"])
def test_whole_numbers_by_row(method: str, made: Made) -> None:
    _require_even_steps(made(method, 8))
    _require_near_products(made(method, 8))


@pytest.mark.parametrize("scheme", ["dynamic", "static", "block"])
def test_e4m3(scheme: str, made: Made) -> None:
    """A million numbers of a normal distribution, 256 a row with its scale, are off by 0.0261."""
    folder, _ = made("fp8", 8, scheme=scheme)
    assert 0.0255 < decoding.error(folder, MODEL) < 0.0275
    _require_near_products(made("fp8", 8, scheme=scheme))


@pytest.mark.parametrize("double", [True, False])
def test_nf4(double: bool, made: Made) -> None:
    """A million numbers of a normal distribution, in blocks of 64, are off by 0.0920."""
    checkpoint = made("nf4", 4, double_quant=double)
    assert 0.090 < decoding.error(checkpoint[0], MODEL) < 0.094
    _require_plain_products(checkpoint)


def _require_even_steps(checkpoint: tuple[Path, Cell]) -> None:
    """Rounded to the nearest: the error of `even_error`, in the weights as they were rounded.

    Scales of 16 bits are off by up to 1/512, half a step of the farthest of 8-bit codes. GPTQ lets
    weights move to make up for others' errors: 1.46 to 1.54 times the error here.
    """
    folder, cell = checkpoint
    name, bits, options = cell.method.name, cell.bits, cell.method.options
    now = decoding.weights(folder)
    then = scaled(now, folder)
    even = decoding.even_error(
        then, bits, options.get("group_size"), symmetric=options.get("symmetric", True)
    )
    low, high = (1.3, 1.7) if name == "gptq" else (0.98, 1.02 if bits < 8 else 1.2)
    assert low < decoding.apart(now, then) / even < high


def _require_plain_products(checkpoint: tuple[Path, Cell]) -> None:
    """The engine computes what a plain model does with the decoded weights."""
    found, _ = checkpoints.scored(checkpoint)
    reference = checkpoints.plainly(decoding.unquantized(MODEL, checkpoint[0]))
    assert float((found - reference).abs().max()) < 1e-4


def _require_near_products(checkpoint: tuple[Path, Cell]) -> None:
    """The same where the engine rounds activations to 8 bits, which moves it a little."""
    found, _ = checkpoints.scored(checkpoint)
    reference = checkpoints.plainly(decoding.unquantized(MODEL, checkpoint[0])).double()
    apart = (reference.exp() * (reference - found.double())).sum(-1).mean()
    assert 1e-6 < float(apart) < 5e-4
