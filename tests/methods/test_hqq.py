"""HQQ in every width: what is stored, decoded by hand, and what the runtime computes with it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qgrid.contracts import Unsupported
from qgrid.methods import hqq
from qgrid.types import Cell
from qgrid.weights import artifacts, inspection, widths
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.methods import checkpoints, decoding
from tests.methods.checkpoints import MODEL, Made

WIDTHS = hqq.SUPPORTS.bits
ACROSS: dict[str, Any] = {"axis": 0}
LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("bits", "changes", "stored"),
    [
        *((bits, {}, bits + 0.5) for bits in (1, 2, 4, 8)),
        (3, {}, 3.2 + 0.5),
        (4, {"group_size": 32}, 5.0),
        (2, {"group_size": None}, 2.125),
        (4, ACROSS, 4.5),
        (3, {"group_size": 128, **ACROSS}, 3.25 + 0.25),  # 130 places for 128 codes
        (1, {"group_size": None, **ACROSS}, 1.0625),
    ],
)
def test_every_width_is_what_it_says(
    bits: int,
    changes: dict[str, Any],
    stored: float,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, "hqq", bits, **changes)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {"hqq": 14}
    bare = inspection.inspect(Path(job.artifact))  # without its base
    whole = inspection.inspect(tiny_random)
    assert (bare.format, bare.shapes) == ("hqq", whole.shapes)
    assert bare.num_parameters == whole.num_parameters
    for name, state in bare.modules.items():
        exact = hqq.stored_bits(bits, job.planned.cell.method.options, *bare.shapes[name])
        assert state.bits == pytest.approx(exact, rel=1e-9)
    assert bare.modules["model.layers.0.mlp.gate_proj"].bits == pytest.approx(stored, rel=0.01)


def test_layers_have_the_widths_that_are_asked_for(
    tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    keep = {"model.layers.0.*": 8, LAYER: 2, "model.layers.1.mlp.*": 16, "lm_head": 16}
    job = jobs.job(make_cell, tmp_path, tiny_random, "hqq", 3, keep=keep)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    manifest = artifacts.load_manifest(Path(job.artifact))
    for name, state in manifest.modules.items():
        asked = widths.of(3, {"keep": keep}, name)
        assert asked <= state.bits < asked + 0.8
    assert result.observed["module_methods"] == {"hqq": 11, "none": 3}


@pytest.mark.parametrize(
    ("bits", "low", "high", "changes"),
    [
        (8, 0.9, 1.0, {}),
        (4, 0.9, 1.0, {}),
        (3, 0.9, 1.0, {}),
        (2, 0.9, 1.0, {}),
        (1, 0.6, 0.9, {}),
        (4, 0.9, 1.0, ACROSS),
    ],
)
def test_weights_are_off_by_what_rounding_makes_and_logits_are_theirs(
    bits: int, low: float, high: float, changes: dict[str, Any], made: Made
) -> None:
    """Against evenly spread errors of the group's own range: `expected_error`.

    The solver moves zero points so that outliers are cut, to gain a few percent for the rest. With
    one bit a weight is not inside a step but near the end of one, and the formula says too much.
    """
    folder, cell = made("hqq", bits, **changes)
    expected = decoding.expected_error(MODEL, bits, 64, cell.method.options["axis"])
    assert low < decoding.error(folder, MODEL) / expected < high
    found, seen = checkpoints.scored((folder, cell))
    reference = checkpoints.plainly(decoding.unquantized(MODEL, folder))
    assert float((found - reference).abs().max()) < 1e-4
    assert seen["stores_in"] == seen["computes_in"] == {"hqq": 35}
    told = {"modules": 35, "method": "hqq", "scheme": f"W{bits}A16"}
    assert seen["linear_kernels"] == [told | {"kernel": "hqq-pytorch", "dtype": "float32"}]
    assert not seen["decompressed"]


def test_fewer_bits_are_further_from_16(made: Made) -> None:
    apart = [checkpoints.divergence(checkpoints.scored(made("hqq", bits))[0]) for bits in WIDTHS]
    assert WIDTHS == (1, 2, 3, 4, 8)
    for coarse, fine in pairwise(apart):
        assert coarse > 3 * fine > 0


def test_bf16_computes_in_bf16_and_holds_what_is_stored(made: Made) -> None:
    folder, cell = made("hqq", 4)
    found, seen = checkpoints.scored((folder, cell), "bfloat16")
    assert seen["linear_kernels"][0]["dtype"] == "bfloat16"
    assert checkpoints.divergence(found) < 3e-3
    data = sum(inspection.inspect(folder).dtypes.values())
    assert seen["weights_bytes"] == pytest.approx(data, rel=0.01)


def _refusal(make_cell: Callable[..., Cell], folder: Path, bits: int, **changes: Any) -> str | None:
    job = jobs.job(make_cell, folder / "store", folder / "model", "hqq", bits, **changes)
    return hqq.refusal(job.planned.cell)


def test_what_does_not_divide_is_refused_before_any_work(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    write_model(tmp_path / "model", intermediate_size=288, num_hidden_layers=1)
    write_tokenizer(tmp_path / "model")
    said = str(_refusal(make_cell, tmp_path, 4))
    assert "group_size=64` does not divide the columns of 1 layers: model.layers.0.mlp" in said
    assert "(288 columns); use `method.group_size=32` (divides all) or" in said
    across = str(_refusal(make_cell, tmp_path, 4, axis=0))
    assert "does not divide the rows of 2 layers" in across
    assert across.endswith("`method.group_size=null` (one scale a column)")
    assert _refusal(make_cell, tmp_path, 4, group_size=32) is None
    words = str(_refusal(make_cell, tmp_path, 3, group_size=32, axis=0))
    assert "packs codes of 3 bits 10 in a word, which 32 along `method.axis=0`" in words
    keep = {"model.layers.0.mlp.*": 3}
    assert _refusal(make_cell, tmp_path, 4, group_size=32, axis=0, keep=keep) == words
    assert _refusal(make_cell, tmp_path, 4, keep={"*.down_proj": 16}) is None
    assert "5 bits" in str(_refusal(make_cell, tmp_path, 4, keep={"model.*": 5}))
    with pytest.raises(Unsupported, match="does not divide the columns"):
        job = jobs.job(make_cell, tmp_path / "store", tmp_path / "model", "hqq", 4)
        artifacts.build(job)
