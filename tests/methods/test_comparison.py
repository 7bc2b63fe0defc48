"""Published layers against the base's: what is near, what was scaled, and what is neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgrid import published
from qgrid.published import _comparison, _nearness
from qgrid.types import Cell
from tests.methods import foreign

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(64, 512)).astype(np.float32)
Tensors = dict[str, torch.Tensor]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
QUERY = "model.layers.0.self_attn.q_proj"
NORMS = {
    "input_layernorm.weight": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm.weight": ["mlp.gate_proj", "mlp.up_proj"],
}
NORM = "model.layers.0.input_layernorm.weight"


def rounded(bits: int, base: Any = BASE) -> Any:
    """To nearest under one scale for 128 weights."""
    groups = base.reshape(len(base), -1, 128)
    step = 2 * np.abs(groups).max(-1, keepdims=True) / (2**bits - 1)
    codes = np.clip(np.round(groups / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * step).reshape(base.shape).astype(np.float32)


def wrong(found: Any, bits: int) -> str | None:
    return _nearness.nearness(found, BASE, bits, floats=False).wrong


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_a_width_leaves_is_near_and_what_is_not_is_told(bits: int) -> None:
    """The margins: GPTQ's errors are up to 1.7 times those of rounding rows, 2 are allowed."""
    good = rounded(bits)
    assert wrong(good, bits) is None
    assert wrong(BASE + 1.6 * (good - BASE), bits) is None
    assert "of its size apart" in str(wrong(RNG.permutation(good), bits))
    assert "of its size apart" in str(wrong(np.full_like(good, np.nan), bits))
    swapped = good.copy()
    swapped[[17, 40]] = swapped[[40, 17]]
    assert wrong(swapped, bits) == "has other rows (17, 40)"
    larger = str(wrong(good * {8: 1.025, 4: 1.05, 3: 1.2, 2: 1.6}[bits], bits))
    assert "of its size apart" in larger or "times as large" in larger
    largest = np.abs(BASE.reshape(-1, 128)).max(1)
    step = np.sqrt((largest**2).mean()) * 2 / (2**bits - 1)
    error = _nearness.nearness(good, BASE, bits, floats=False).error
    assert error == pytest.approx(step / 12**0.5, rel=0.05 if bits > 2 else 0.15)


def test_fine_tune_is_seen_where_it_is_larger_than_rounding() -> None:
    """One that moves weights by 3 % is seen at 8 bits; below it is lost in what rounding leaves."""
    tuned = BASE + 0.03 * RNG.normal(size=BASE.shape).astype(np.float32)
    assert "of its size apart" in str(wrong(rounded(8, tuned), 8))
    assert wrong(rounded(4, tuned), 4) is None


# --- whole checkpoints ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoothed(
    tmp_path_factory: pytest.TempPathFactory, tiny_random: Path, make_cell: Callable[..., Cell]
) -> Path:
    """8 bits of the random model after columns took scales from norms, and from rows before.

    As by AWQ on a trained model those of rows are milder, and about a number that is not one.
    """
    folder = tmp_path_factory.mktemp("smoothed")
    return smooth(folder, tiny_random, make_cell, 8)


def smooth(
    folder: Path, base: Path, make_cell: Callable[..., Cell], bits: int, offset: float = 0.0
) -> Path:
    """`offset`: what a norm adds to its weight before it multiplies."""
    generator = torch.Generator().manual_seed(0)

    def scales(size: int, spread: float) -> torch.Tensor:
        return torch.exp(spread * torch.randn(size, generator=generator))

    def move(tensors: Tensors) -> None:
        for block in ("model.layers.0.", "model.layers.1."):
            for norm, layers in NORMS.items():
                taken = scales(len(tensors[block + norm]), 0.4)
                weight = offset + tensors[block + norm].float()
                tensors[block + norm] = (weight / taken - offset).bfloat16()
                for name in layers:
                    tensors[f"{block}{name}.weight"].mul_(taken)
            up, down = (tensors[f"{block}mlp.{name}.weight"] for name in ("up_proj", "down_proj"))
            taken = 1.6 * scales(len(up), 0.15)
            up.div_(taken[:, None])
            down.mul_(taken)

    moved = foreign.changed(base, folder / "moved", move)
    return foreign.stripped(make_cell, folder / "store", moved, "rtn", bits)


def verdicts(folder: Path, base: Path) -> dict[str, tuple[bool, str]]:
    found = _comparison.Comparison(folder, base, published.read(folder)).checks()
    return {check.name: (check.ok, check.actual) for check in found}


def test_scales_of_norms_and_of_rows_are_accounted_for(smoothed: Path, tiny_random: Path) -> None:
    said = verdicts(smoothed, tiny_random)
    assert said["weights"][0], said
    assert said["weights"][1].endswith("12 of them under other scales")
    assert said["kept"] == (True, "2 equal, 4 scaled as the layers after them")


@pytest.mark.parametrize(("bits", "offset"), [(3, 0.0), (4, 0.0), (4, 1.0)])
def test_scales_are_accounted_for_where_rounding_is_coarse(
    bits: int, offset: float, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    said = verdicts(smooth(tmp_path, tiny_random, make_cell, bits, offset), tiny_random)
    assert said["weights"][0], said
    assert said["kept"] == (True, "2 equal, 4 scaled as the layers after them")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(f"{QUERY}.weight_scale", f"{QUERY} is "), (f"{UP}.weight_scale", f"{UP} is "),
     (f"{DOWN}.weight_scale", f"{DOWN} is ")],
)  # fmt: skip
def test_constant_factor_on_top_of_scales_is_nobodys(
    tensor: str, message: str, smoothed: Path, tmp_path: Path, tiny_random: Path
) -> None:
    bad = foreign.changed(smoothed, tmp_path / "bad", lambda t: t[tensor].mul_(1.1))  # type: ignore[arg-type]
    ok, said = verdicts(bad, tiny_random)["weights"]
    assert not ok
    assert message in said


def test_norm_of_a_block_that_is_not_sampled_must_be_explained_too(
    smoothed: Path, tmp_path: Path, tiny_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_comparison, "_BLOCKS", 1)  # the last
    said = verdicts(smoothed, tiny_random)
    assert said["weights"][1].startswith("7 of 14 layers")
    assert said["kept"][0]

    def spoil(tensors: Tensors) -> None:
        tensors[NORM] *= 1 + torch.arange(len(tensors[NORM])) % 2

    bad = foreign.changed(smoothed, tmp_path / "bad", spoil)
    assert verdicts(bad, tiny_random)["kept"] == (False, f"{NORM} has other values")


def test_two_layers_that_changed_places_are_caught(
    smoothed: Path, tmp_path: Path, tiny_random: Path
) -> None:
    other = QUERY.replace("0", "1")

    def swap(tensors: Tensors) -> None:
        for key in [each for each in tensors if each.startswith(f"{QUERY}.")]:
            there = key.replace(QUERY, other)
            tensors[key], tensors[there] = tensors[there], tensors[key]

    bad = foreign.changed(smoothed, tmp_path / "bad", swap)
    ok, said = verdicts(bad, tiny_random)["weights"]
    assert not ok
    assert QUERY in said
    assert other in said


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_parts_that_do_not_fit_are_named(
    part: str, smoothed: Path, tmp_path: Path, tiny_random: Path
) -> None:
    def cut(tensors: Tensors) -> None:
        tensors[f"{QUERY}.{part}"] = tensors[f"{QUERY}.{part}"][:-3].contiguous()

    bad = foreign.changed(smoothed, tmp_path / "bad", cut)
    ok, said = verdicts(bad, tiny_random)["weights"]
    assert not ok
    assert f"{QUERY} cannot be decoded (" in said
